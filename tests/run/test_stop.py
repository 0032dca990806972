"""A run that is asked to stop saves first, and another signal than these ends it as ever."""

import os
import signal
import types

import pytest
import torch
from transformers import TrainerControl

from rmipo.run.stop import EXIT_STOPPED, StopOnSignal

ARGUMENTS = types.SimpleNamespace(device=torch.device("cpu"))


def after_a_step(stop):
    control = TrainerControl()
    stop.on_step_end(ARGUMENTS, None, control)
    return stop.stopped, control.should_save, control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_run_stops_after_the_step_in_which_a_signal_comes(number):
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    stop = StopOnSignal()
    try:
        with stop:
            assert after_a_step(stop) == (False, False, False)
            os.kill(os.getpid(), number)
            assert signal.getsignal(signal.SIGINT) is interrupt  # before training Ctrl-C ends at once
            assert after_a_step(stop) == (True, True, True)
        assert received == []
        os.kill(os.getpid(), number)  # after the run the signal is its caller's again
        assert received == [number]
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_at_once():
    stop = StopOnSignal()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop.on_train_begin(ARGUMENTS, None, None)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert after_a_step(stop) == (True, True, True)
        stop.on_train_end(ARGUMENTS, None, None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_exit_code_asks_for_another_start():
    assert EXIT_STOPPED == os.EX_TEMPFAIL == 75
