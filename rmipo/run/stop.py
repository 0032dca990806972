"""What ends a run early: a signal, once the step is saved, and a loss that is not finite. And where a hanging process waits."""

import faulthandler
import math
import os
import signal
import sys

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from rmipo.errors import UserError

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
