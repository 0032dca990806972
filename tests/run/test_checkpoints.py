"""What counts as a checkpoint, which are deleted when, and what a full disk leaves.

A run that is asked to stop saves first; one whose loss is not finite ends; one that hangs says where.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerControl, TrainerState

from rmipo.errors import CheckpointError
from rmipo.files import LOCK_FILE
from rmipo.record import differences, read_metrics, run_identity
from rmipo.run.callbacks import FiniteWatchdog, NonFiniteStepError, Recorder, StopOnSignal
from rmipo.run.frame import FullDiskError, delete_torn, explained_full_disk, resume_point
from rmipo.training.checkpoints import MARKER, ResumableTrainer, complete, complete_checkpoints, rotate
from tests.helpers.launched import launch
from tests.helpers.twins import changed, make_twin

IDENTITY = run_identity({"learning_rate": 1e-6, "objective": {"name": "rmipo", "beta": 2.0}}, {"train": "a"}, 2)


def make_checkpoints(folder, complete, torn=(), identity=IDENTITY):
    for step in (*complete, *torn):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "weights").write_text("x")
    for step in complete:
        (folder / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"step": step, **identity}))


def save(folder, step, limit=None, best=None, first_process=True):
    if first_process:
        delete_torn(folder)
    (folder / f"checkpoint-{step}").mkdir()
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(output_dir=str(folder), should_save=first_process, save_total_limit=limit), marks=IDENTITY,
        state=TrainerState(global_step=step, best_model_checkpoint=best), accelerator=PartialState(),
    )  # fmt: skip
    ResumableTrainer.complete_checkpoint(trainer)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_left_of_a_save_is_deleted_and_nothing_else(tmp_path, capsys):
    make_checkpoints(tmp_path, complete=(2,), torn=(4,))
    save(tmp_path, 3, limit=1, first_process=False)  # other processes than the first delete and mark nothing
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    (tmp_path / "checkpoint-3").rmdir()
    (tmp_path / "checkpoint-notes.txt").touch()
    mine = ["checkpoint-4-mine", "checkpoint-best", "checkpoints"]
    for name in mine:
        (tmp_path / name).mkdir()
    save(tmp_path, 6)
    assert names(tmp_path) == sorted(["checkpoint-2", "checkpoint-6", "checkpoint-notes.txt", *mine])
    assert capsys.readouterr().out == f"{tmp_path}/checkpoint-4 is incomplete: deleted\n"
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize(
    "limit, best, kept",
    [(None, 2, (2, 10, 4, 12)), (0, 2, (2, 10, 4, 12)), (1, None, (12,)), (1, 2, (2, 12)), (3, 12, (10, 4, 12))],
)
def test_as_many_checkpoints_stay_as_the_limit_says_and_the_best(tmp_path, limit, best, kept):
    """Torn ones don't count."""
    make_checkpoints(tmp_path, complete=(2, 10, 4))
    (tmp_path / "checkpoint-11").mkdir()
    save(tmp_path, 12, limit, best=best and str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in kept)


@pytest.mark.parametrize("calls", range(1, 6))
def test_what_a_kill_leaves_of_a_deletion_is_deleted_by_the_next_start(tmp_path, monkeypatch, calls):
    """Killed before the n-th call that removes a file or folder, of six."""
    make_checkpoints(tmp_path, complete=(2, 4))
    (tmp_path / "checkpoint-2/global_step2").mkdir()
    (tmp_path / "checkpoint-2/global_step2/share").touch()
    left = [calls]

    def until_killed(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise SystemExit("killed here")
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, until_killed(getattr(os, name)))
        rotate(tmp_path, 1, TrainerState(global_step=4))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4"]
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    assert resume_point(tmp_path, IDENTITY).endswith("checkpoint-4")
    save(tmp_path, 6)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6", "run.json"]


def test_files_of_somebody_else_are_not_overwritten(tmp_path):
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / "metrics.jsonl.tmp").touch()
    assert resume_point(tmp_path, IDENTITY) is None
    make_checkpoints(tmp_path, complete=(), torn=(500,))  # of a plain Trainer, without our marker
    with pytest.raises(CheckpointError, match="Found: checkpoint-500"):
        resume_point(tmp_path, IDENTITY)


def test_a_checkpoint_that_has_lost_a_file_is_refused(tmp_path):
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6/optimizer.pt").touch()
    complete(tmp_path, 6, IDENTITY)
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-6"]
    (tmp_path / "checkpoint-6/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6 has lost optimizer\.pt"):
        complete_checkpoints(tmp_path)


def test_a_checkpoint_of_the_model_alone_is_none_to_go_on_from(tmp_path):
    identity = IDENTITY | {"recipe": IDENTITY["recipe"] | {"save_only_model": True}}
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert resume_point(tmp_path, identity) is None
    make_checkpoints(tmp_path, complete=(4,))
    with pytest.raises(CheckpointError, match=r"checkpoint-4 holds the model alone"):
        resume_point(tmp_path, identity)


@pytest.mark.parametrize("foreign", [2, 10])
def test_every_checkpoint_of_a_folder_has_to_be_of_this_run(tmp_path, foreign):
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    make_checkpoints(tmp_path, complete={2, 4, 10} - {foreign}, torn=(12,))
    assert Path(resume_point(tmp_path, IDENTITY)).name == f"checkpoint-{10 if foreign != 10 else 4}"
    make_checkpoints(tmp_path, complete=(foreign,), identity=IDENTITY | {"world_size": 4})
    message = f"^{tmp_path}/checkpoint-{foreign} belongs to another run.*Different there:\n  world_size: 4, now 2$"
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        resume_point(tmp_path, IDENTITY)


Usage = namedtuple("Usage", "total, used, free")
TORN = "[enforce fail at inline_container.cc:626] . unexpected pos 1024 vs 918"  # of torch.save


@pytest.mark.parametrize(
    "error, free, full",
    [
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2**30, True),
        (OSError(errno.EIO, "write"), 0, False),
        (RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), 2**30, True),
        (RuntimeError(TORN), 2**20 - 1, True),
        (RuntimeError(TORN), 2**20, False),
        (ValueError("a pair is empty"), 0, False),
    ],
    ids=str,
)
def test_what_a_full_disk_raises_is_told_as_that(tmp_path, monkeypatch, error, free, full):
    make_checkpoints(tmp_path, complete=(2, 10, 4), torn=(12,))
    monkeypatch.setattr(shutil, "disk_usage", {tmp_path: Usage(2**40, 2**40 - free, free)}.get)
    with pytest.raises(FullDiskError if full else type(error)) as raised, explained_full_disk(str(tmp_path)):
        raise error
    assert (raised.value.__cause__ if full else raised.value) is error
    if full:
        assert str(tmp_path) in str(raised.value) and "checkpoint-10" in str(raised.value)


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
            os.kill(os.getpid(), signal.SIGTERM)  # queues repeat theirs: the step is saved all the same
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


def test_one_evaluation_of_a_step_is_kept(tmp_path):
    recorder, args, state = Recorder(), types.SimpleNamespace(output_dir=tmp_path), TrainerState(global_step=3)
    recorder.on_train_begin(args, state, None)
    for loss in (1.0, 2.0):  # the second is that of a finished training
        recorder.on_log(args, state, None, logs={"eval_loss": loss})
    assert read_metrics(tmp_path) == [{"step": 3, "eval_loss": 1.0}]


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
