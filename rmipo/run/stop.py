"""A run that is asked to stop saves first."""

import signal

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

EXIT_STOPPED = 75  # of a run that a signal stopped after it saved: start it again (EX_TEMPFAIL)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 (a queue that needs the machine): finish the step, save, stop. All processes stop together.

    Listens while it is entered.
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

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor([float(self.requested)], device=args.device)
        if gather(requested).sum().item() > 0:
            self.stopped = control.should_save = control.should_training_stop = True
