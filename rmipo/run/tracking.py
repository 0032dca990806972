"""What a run leaves beside its model: `run.json`, `metrics.jsonl`, W&B rows, sample generations."""

import json
from pathlib import Path

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import WandbCallback, rewrite_logs
from trl.models.utils import unwrap_model_for_generation

from rmipo.files import write_atomically
from rmipo.record import GENERATIONS_FILE, METRICS_FILE, read_metrics
from rmipo.training import attention


class MetricsFile(TrainerCallback):
    """Appends every logged line to `metrics.jsonl`, with its step; one evaluation per step.

    A resumed run goes on after its checkpoint's step, so that the file is that of an undisturbed run.
    """

    def __init__(self):
        self.evaluated = -1  # the last step with an evaluation in the file

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / METRICS_FILE
        if not state.is_world_process_zero or not path.exists():
            return
        kept = []
        for text in path.read_text().splitlines(keepends=True):
            # A line that a kill cut short has no newline.
            if state.global_step == 0 or not text.endswith("\n") or json.loads(text)["step"] > state.global_step:
                break
            kept.append(text)
            if "eval_loss" in text:
                self.evaluated = json.loads(text)["step"]
        write_atomically(path, "".join(kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        evaluation = "eval_loss" in logs
        # The summary at the end of training covers only what came after the last start.
        if (
            not state.is_world_process_zero
            or "train_runtime" in logs
            or (evaluation and self.evaluated == state.global_step)
        ):
            return
        if evaluation:
            self.evaluated = state.global_step
        with open(Path(args.output_dir) / METRICS_FILE, "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Progress(ProgressCallback):
    """The progress bar with its ETA, and one short line per log instead of every number: those are in `metrics.jsonl`."""

    SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "rmipo/gamma_mean", "entropy", "mean_token_accuracy")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        held_out = any(name.startswith("eval_") for name in logs)
        logs = {name.removeprefix("eval_"): value for name, value in logs.items()}
        shown = {name.split("/")[-1]: f"{logs[name]:.4g}" for name in self.SHOWN if name in logs}
        if held_out:
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}, held out: {values}")
        elif shown:
            self.training_bar.set_postfix(shown, refresh=False)


class WandbBySteps(WandbCallback):
    """W&B rows numbered by optimizer step: of a resumed run W&B drops those that it has, and is given those it lost.

    Comes after `MetricsFile`, which knows what was logged up to the checkpoint.
    """

    SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if state.is_world_process_zero and state.global_step > 0:
            for line in read_metrics(args.output_dir):
                if line["step"] >= self._wandb.run.step:
                    self._log(line.pop("step"), line)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if state.is_world_process_zero:
            self._wandb.run.summary.update({name: logs[name] for name in self.SUMMARY if name in logs})
            self._log(state.global_step, {name: value for name, value in logs.items() if name not in self.SUMMARY})

    def _log(self, step: int, values: dict) -> None:
        self._wandb.log({**rewrite_logs(values), "train/global_step": step}, step=step)


def use_own_callbacks(trainer: Trainer) -> None:
    """Put this module's progress bar and W&B rows in place of those that the Trainer has added."""
    for theirs, ours in ((ProgressCallback, Progress), (WandbCallback, WandbBySteps)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())


class SampleGenerations(TrainerCallback):
    """At each evaluation: answers to a few held-out prompts, in `generations.jsonl`.

    Args:
        tokenizer: decodes, and gives end and padding tokens.
        prompts: lists of prompt token ids.
        trainer: the `PreferenceTrainer`, for the wrapped model.
        max_new_tokens: per answer.
    """

    def __init__(self, tokenizer, prompts: list[list[int]], trainer, max_new_tokens: int):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.trainer = trainer
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        texts = self.generate(args.seed)
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / GENERATIONS_FILE
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        lines = [line for line in lines if line["step"] < state.global_step]
        for prompt, text in zip(self.prompts, texts, strict=True):
            lines.append({"step": state.global_step, "prompt": self.tokenizer.decode(prompt), "answer": text})
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    @torch.no_grad()
    def generate(self, seed: int) -> list[str]:
        """Greedy answers; every rank takes part, since ZeRO-3 gathers the parameters."""
        trainer, answers = self.trainer, []
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            attention.attach(model, "plain")
            for prompt in self.prompts:
                ids = torch.tensor([prompt], device=trainer.args.device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    synced_gpus=trainer.args.world_size > 1,
                )
                answers.append(self.tokenizer.decode(output[0, len(prompt) :]))
            attention.attach(model, trainer.attention_kind)
        return answers
