"""The W&B run of a run: opened before its model is loaded, with rows that survive a kill."""

import os
import sys

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs

from rmipo.record import read_metrics


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
