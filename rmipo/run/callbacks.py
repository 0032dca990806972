"""Everything that happens beside the optimizer steps of a run, in one order."""

from transformers import DefaultFlowCallback, Trainer, TrainerCallback
from transformers.integrations import WandbCallback

from rmipo.record import append_metrics, keep_metrics
from rmipo.run.generations import SampleGenerations
from rmipo.run.stop import FiniteWatchdog, SilenceWatchdog, StopOnSignal
from rmipo.run.trackers import WandbBySteps


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
