"""A run that is asked to stop saves first."""

import os
import signal

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

EXIT_STOPPED = 75  # of a run that a signal stopped after it saved: start it again (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGUSR1 (a queue that needs the machine) or Ctrl-C: finish the step, save, stop, all processes together.

    Listens while it is entered; to Ctrl-C only in training, where there is something to save. A second one ends at once.
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
        self.requested = True

    def _interrupt(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print, which this may have interrupted.
        os.write(2, b"\nstopping after this step, which is saved; Ctrl-C once more ends at once\n")

    def on_train_begin(self, args, state, control, **kwargs):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
            signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, args, state, control, **kwargs):
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor([float(self.requested)], device=args.device)
        if gather(requested).sum().item() > 0:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped and state.epoch != int(state.epoch) and state.global_step < state.max_steps:
            control.should_evaluate = False  # no epoch ends here; an undisturbed run has no such line
