"""Everything that happens beside the optimizer steps of a run: early ends, W&B, sample answers, the record, in one order."""

import faulthandler
import math
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import gather
from torch.nn.utils.rnn import pad_sequence
from transformers import DefaultFlowCallback, StoppingCriteriaList, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs

from rmipo.errors import UserError
from rmipo.files import write_lines
from rmipo.record import GENERATIONS_FILE, append_metrics, keep_metrics, read_generations, read_metrics
from rmipo.training import attention
from rmipo.training.loading import positions_of

EXIT_STOPPED = 75  # of a run that a signal stopped after it saved: start it again (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SILENCE = 1 / 3  # of ddp_timeout, after which a step that does not end is reported


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGUSR1 (a queue that needs the machine) or Ctrl-C: finish the step, save, stop, all processes together.

    Listens while it is entered. A second Ctrl-C ends at once.
    """

    def __init__(self):
        self.requested = self.stopped = False
        self.before = {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self._request) for number in SIGNALS}

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print, which this may have interrupted.
        os.write(2, b"\nwill save and stop after the next step; press Ctrl-C again to end at once\n")

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor([float(self.requested)], device=args.device)
        if gather(requested).sum().item() > 0:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped and state.epoch != int(state.epoch) and state.global_step < state.max_steps:
            control.should_evaluate = False  # no epoch ends here; an undisturbed run has no such line


class NonFiniteStepError(UserError, RuntimeError):
    """A logged loss or gradient norm is NaN or infinite."""


class FiniteWatchdog(TrainerCallback):
    """Stops a run whose loss or gradient norm is NaN or infinite, before the step can be saved."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ("loss",) if args.fp16 else ("loss", "grad_norm")  # float16's loss scaling skips steps that overflow
        found = {name: logs[name] for name in names if not math.isfinite(logs.get(name, 0.0))}
        if found:
            fix = "Lower learning_rate or max_grad_norm, or look for a broken row; train into another output_dir"
            raise NonFiniteStepError(f"step {state.global_step}: {found}. The last checkpoint is from before. {fix}")


class SilenceWatchdog(TrainerCallback):
    """When nothing ends for a third of `ddp_timeout`, each process prints where it waits, on standard error."""

    def _heard(self, args, state, control, **kwargs):
        # Each call starts the time anew. The stream of the process: tests and notebooks put others in its place.
        faulthandler.dump_traceback_later(args.ddp_timeout * SILENCE, repeat=False, file=sys.__stderr__)

    on_train_begin = on_step_end = on_prediction_step = on_evaluate = on_save = _heard

    def on_train_end(self, *arguments, **kwargs):
        faulthandler.cancel_dump_traceback_later()


def open_wandb(name: str | None, run_id: str) -> None:
    """Open the W&B run `run_id`, or continue it where an earlier start of this run opened it."""
    import wandb  # a second, and only runs that report to it need it

    wandb.init(
        project=os.environ.get("WANDB_PROJECT", "huggingface"),
        name=name,
        id=os.environ.get("WANDB_RUN_ID", run_id),
        resume=os.environ.get("WANDB_RESUME", "allow"),
    )


def close_wandb(error: type[BaseException] | None) -> None:
    """Wait until W&B has all that was logged; `error` is the type of what ends the run early."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(error is not None and not issubclass(error, SystemExit)))


def log_answers(callbacks: list[TrainerCallback], answers: list[dict], step: int) -> None:
    """Sample generations of a step: a table in W&B, text in TensorBoard, where the run reports to them."""
    for callback in callbacks:
        if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            rows = [[*answer.values()] for answer in answers]
            callback._wandb.log({"generations": callback._wandb.Table([*answers[0]], rows)}, step=step)
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for number, answer in enumerate(answers):
                # Markdown: an indented block shows a text as it is.
                text = "\n".join(f"    {line}" for line in f"{answer['prompt']}{answer['answer']}".splitlines())
                callback.tb_writer.add_text(f"generations/{number}", text, step)


class WandbBySteps(WandbCallback):
    """W&B rows numbered by optimizer step: of a resumed run W&B drops those that it has, and is given those it lost."""

    SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if state.is_world_process_zero and state.global_step > 0:
            for line in read_metrics(args.output_dir):
                # W&B refuses steps that it has passed.
                if line["step"] >= self._wandb.run.step:
                    self._log(line.pop("step"), line)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if state.is_world_process_zero:
            self._wandb.run.summary.update({name: logs[name] for name in self.SUMMARY if name in logs})
            self._log(state.global_step, {name: value for name, value in logs.items() if name not in self.SUMMARY})

    def _log(self, step: int, values: dict) -> None:
        self._wandb.log({**rewrite_logs(values), "train/global_step": step}, step=step)


def default_tokens(world_size: int) -> int:
    """Of an answer. Under ZeRO-3 each token gathers all weights; between machines that takes longer than the training."""
    return 128 if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size else 32


class SampleGenerations(TrainerCallback):
    """At each evaluation: answers to a few held-out prompts (token ids), in `generations.jsonl`.

    `max_new_tokens`: of an answer, `default_tokens` if None; fewer where the model has no positions for more. `stop`: the run's
    `StopOnSignal`; a signal ends the answers too, which are then not kept.
    """

    def __init__(self, tokenizer, prompts: list[list[int]], trainer, max_new_tokens: int | None, stop: StopOnSignal):
        self.tokenizer, self.prompts, self.trainer = tokenizer, prompts, trainer
        self.max_new_tokens, self.stop = max_new_tokens or default_tokens(trainer.args.world_size), stop

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.prompts:
            return
        texts = self.generate()
        if not state.is_world_process_zero or self.stop.requested:
            return
        answers = [
            {"step": state.global_step, "prompt": self.tokenizer.decode(prompt), "answer": text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        # A resumed run evaluates this step again: its answers take the place of those before the kill.
        lines = [line for line in read_generations(args.output_dir) if line["step"] < state.global_step]
        write_lines(Path(args.output_dir) / GENERATIONS_FILE, lines + answers)
        log_answers(self.trainer.callback_handler.callbacks, answers, state.global_step)

    def generate(self) -> list[str]:
        """Greedy answers; every process takes part, as each forward gathers its weights layer by layer under ZeRO-3.

        All weights at once would not fit beside a large model's states. In eval mode nothing is checkpointed, so the
        setting of activation checkpointing stays as it is.
        """
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
        # Packed attention has no cache of keys, which generation needs.
        attention.attach(model, "plain")
        # One batch: under ZeRO-3 and FSDP2 every forward gathers all weights, for one row or for many.
        pad_id, device = self.tokenizer.pad_token_id or 0, trainer.args.device
        rows = [torch.tensor(prompt, device=device) for prompt in self.prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        longest = ids.shape[1]
        positions = positions_of(model.config.get_text_config()) or math.inf
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=min(self.max_new_tokens, positions - longest),
            pad_token_id=pad_id,
            # All processes go on until the last one has ended, so a signal to some of them hangs nobody.
            synced_gpus=trainer.args.world_size > 1,
            stopping_criteria=StoppingCriteriaList([self.stopped]),
        )
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        attention.attach(model, trainer.attention_kind)
        return [self.tokenizer.decode(until(row, ends)) for row in output[:, longest:].tolist()]

    def stopped(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """As transformers asks after each token, of every row."""
        return torch.full((len(input_ids),), self.stop.requested, device=input_ids.device)


def until(ids: list[int], ends: set[int]) -> list[int]:
    """`ids` up to the first of `ends`, which is kept; behind it is padding."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]


class Recorder(TrainerCallback):
    """Appends every logged line to `metrics.jsonl`, with its step; one evaluation per step.

    A resumed run goes on after its checkpoint's step, so that the file is that of an undisturbed run. For that a line is
    logged with each checkpoint: one that covers steps on both sides of a kill could not be made again. The checkpoint of
    an epoch's or the run's last step waits for the epoch's end: an evaluation that is due there would be missing after a
    kill between the two.
    """

    def __init__(self):
        self.waiting = False
        self.evaluated = -1  # the last step with an evaluation in the file

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            kept = keep_metrics(args.output_dir, state.global_step)
            self.evaluated = max((line["step"] for line in kept if "eval_loss" in line), default=-1)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        self.waiting = control.should_save and (control.should_training_stop or state.epoch == int(state.epoch))
        control.should_save &= not self.waiting

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.waiting
        control.should_log |= control.should_save
        self.waiting = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The summary at the end of training covers only what came after the last start.
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            if self.evaluated == state.global_step:
                return
            self.evaluated = state.global_step
        append_metrics(args.output_dir, {"step": state.global_step, **logs})


ORDER = [
    DefaultFlowCallback,  # decides when to log, evaluate and save
    StopOnSignal,  # asks for a save too
    Recorder,  # after everything that asks for a save; before W&B, which after a kill sends again what its file holds
    TrainerCallback,  # the trackers of report_to, and whatever is not named here
    FiniteWatchdog,  # ends the run once the line that shows why is written
    SampleGenerations,
    SilenceWatchdog,
]


def set_callbacks(trainer: Trainer, callbacks: list[TrainerCallback]) -> None:
    """Add `callbacks` to those of `trainer`, put W&B rows that survive a kill in place of its own, and sort."""
    if trainer.pop_callback(WandbCallback) is not None:
        trainer.add_callback(WandbBySteps)
    for callback in callbacks:
        trainer.add_callback(callback)
    anything = ORDER.index(TrainerCallback)
    trainer.callback_handler.callbacks.sort(
        key=lambda callback: ORDER.index(type(callback)) if type(callback) in ORDER else anything
    )
