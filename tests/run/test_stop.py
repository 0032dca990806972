"""A run that is asked to stop saves first; one whose loss is not finite ends; one that hangs says where."""

import itertools
import os
import signal
import types
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState

from rmipo.record import differences, run_identity
from rmipo.run.callbacks import FiniteWatchdog, NonFiniteStepError, Recorder, StopOnSignal
from tests.helpers.launched import launch
from tests.helpers.twins import changed, make_twin

ARGUMENTS = types.SimpleNamespace(device=torch.device("cpu"))


def after_a_step(stop):
    control = TrainerControl()
    stop.on_step_end(ARGUMENTS, None, control)
    return stop.stopped, control.should_save, control.should_training_stop


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=str)
def test_a_run_stops_after_the_step_in_which_a_signal_comes(number):
    received = []
    before = signal.signal(number, lambda *_: received.append(number))
    stop = StopOnSignal()
    try:
        with stop:
            assert after_a_step(stop) == (False, False, False)
            os.kill(os.getpid(), number)
            assert after_a_step(stop) == (True, True, True)
            with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C ends at once
                os.kill(os.getpid(), signal.SIGINT)
        assert received == []
        os.kill(os.getpid(), number)  # after the run the signal is its caller's again
        assert received == [number]
    finally:
        signal.signal(number, before)


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
    watchdog.on_log(scaled, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})  # its scaler skips such a step
    for args, loss, norm in ((plain, 1.0, float("nan")), (plain, 1.0, float("inf")), (scaled, float("inf"), 1.0)):
        with pytest.raises(NonFiniteStepError, match="step 7: "):
            watchdog.on_log(args, state, None, logs={"loss": loss, "grad_norm": norm})


def test_sft_that_diverges_stops_before_it_is_saved(tmp_path):
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    overrides = changed(overrides, learning_rate=1e30, save_strategy="steps", save_steps=1, max_steps=4)
    command = ["scripts/sft.py", "--config", "recipes/tiny/sft.yaml", "--output_dir", str(tmp_path / "out")]
    training = launch([*command, *overrides])
    assert training.wait() == 2 and "error: step 2: " in training.output, training.output[-3000:]
    assert [path.parent.name for path in (tmp_path / "out").glob("checkpoint-*/complete.json")] == ["checkpoint-1"]


def test_a_line_is_logged_with_each_checkpoint():
    for save, event in itertools.product((True, False), ("on_step_end", "on_epoch_end")):  # save_strategy: epoch
        control = TrainerControl(should_save=save)
        getattr(Recorder(), event)(None, TrainerState(epoch=0.5), control)
        assert control.should_log is save


def test_what_may_not_change_between_the_starts_of_a_run_is_told():
    recipes = ({"recipe": dict.fromkeys(["hub_model_id", "save_total_limit", "max_grad_norm"], n)} for n in (1, 2))
    assert differences(*recipes) == ["recipe.max_grad_norm: 1, now 2"]

    def identity(value):
        recipe = {"objective": {"report_to": value}, "beta": value}
        return {"recipe": recipe, "fingerprints": {"report_to": value}, "world_size": value}

    assert differences({"recipe": {}}, {"recipe": {"beta": 2}}) == ["recipe.beta: None, now 2"]
    places = ["recipe.beta", "recipe.objective.report_to", "world_size", "fingerprints.report_to"]
    assert differences(identity(1), identity(2)) == [f"{place}: 1, now 2" for place in places]
    identity = run_identity({"betas": (0.9, 0.95), "path": Path("a/b"), 3: None}, {"train": "a"}, 2)
    recipe = {"betas": [0.9, 0.95], "path": "a/b", "3": None}
    assert identity == {"recipe": recipe, "fingerprints": {"train": "a"}, "world_size": 2}
