"""A run that is asked to stop saves first; one whose loss is not finite ends; one that hangs says where."""

import os
import signal
import types

import pytest
import torch
from transformers import TrainerControl, TrainerState

from rmipo.run.stop import FiniteWatchdog, NonFiniteStepError, StopOnSignal
from tests.helpers.launched import launch
from tests.helpers.twins import changed, make_twin

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


def test_a_signal_to_one_process_stops_all(monkeypatch):
    monkeypatch.setattr("rmipo.run.stop.gather", lambda own: torch.stack([own, torch.ones_like(own)]))
    assert after_a_step(StopOnSignal()) == (True, True, True)


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


def test_a_silent_rank_makes_the_others_say_where_they_wait_and_the_timeout_ends_the_run(tmp_path):
    """The recipe's ddp_timeout holds on the CPU too, where transformers leaves it out."""
    command = ["tests/helpers/silent_rank.py", "--ddp_timeout", "6", "--model_name_or_path", "some/model"]
    run = launch(command, processes=2)
    try:
        run.processes[0].join()
    finally:
        run.end()
    assert run.processes[0].exitcode == 1, run.output[-3000:]
    told = run.output.partition("Timeout (0:00:02)!")[2]
    assert "all_reduce" in told and "RuntimeError" in told


def test_a_gradient_that_is_not_finite_stops_the_run():
    state = TrainerState(global_step=7)
    plain, scaled = (types.SimpleNamespace(fp16=fp16) for fp16 in (False, True))
    watchdog = FiniteWatchdog()
    watchdog.on_log(plain, state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    watchdog.on_log(plain, state, None, logs={"eval_loss": 1.0})
    with pytest.raises(NonFiniteStepError, match=r"^step 7: grad_norm is nan"):
        watchdog.on_log(plain, state, None, logs={"loss": 1.0, "grad_norm": float("nan")})
    with pytest.raises(NonFiniteStepError, match=r"^step 7: loss is -inf, grad_norm is inf\. "):
        logs = {"loss": float("-inf"), "grad_norm": float("inf")}
        watchdog.on_log(plain, state, None, logs=logs)
    # float16's scaler skips such a step.
    watchdog.on_log(scaled, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(NonFiniteStepError, match=r"^step 7: loss is inf"):
        watchdog.on_log(scaled, state, None, logs={"loss": float("inf"), "grad_norm": 1.0})


def test_sft_that_diverges_stops_before_it_is_saved(tmp_path):
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    overrides = changed(overrides, learning_rate=1e30, save_strategy="steps", save_steps=1, max_steps=4)
    command = ["scripts/sft.py", "--config", "recipes/tiny/sft.yaml", "--output_dir", str(tmp_path / "out")]
    training = launch([*command, *overrides])
    assert training.wait() == 2 and "error: step 2: grad_norm is nan" in training.output, training.output[-3000:]
    assert [path.parent.name for path in (tmp_path / "out").glob("checkpoint-*/complete.json")] == ["checkpoint-1"]
