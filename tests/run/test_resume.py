"""Killed with SIGKILL anywhere and started again, a run ends where the undisturbed one does: bit for bit, on the CPU."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rmipo.errors import CheckpointError
from rmipo.record import read_metrics
from rmipo.run import checkpoints
from rmipo.run.checkpoints import EXIT_STOPPED, MARKER, differences, resume_point, rotate, run_identity
from tests.helpers.wandb_file import read_history, read_records
from tests.run.test_twins import REPOSITORY, make_twin

NOT_COMPARED = ("tokens_per_second", "peak_memory_gib", "num_tokens", "eval_num_tokens")  # TRL counts from each start
PROCESSES = {"one process": 1, "ZeRO-3 on two": 2}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Overrides for a run of 15 steps over 3 epochs: 35 pairs, which the global batch of 8 doesn't divide."""
    folder = tmp_path_factory.mktemp("twin")
    overrides = make_twin(folder, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    changes = {
        "--max_steps": "-1", "--num_train_epochs": "3", "--global_batch_size": "8", "--per_device_train_batch_size": "2",
        "--max_train_samples": "35", "--eval_strategy": "steps", "--eval_steps": "4", "--save_strategy": "steps",
        "--save_steps": "2", "--lr_scheduler_type": "cosine", "--logging_steps": "1",
    }  # fmt: skip
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True)) | changes
    return [text for pair in flags.items() for text in pair]


@pytest.fixture(scope="module")
def whole(twin, tmp_path_factory):
    """`whole(processes)`: the folder of the undisturbed run."""

    @functools.cache
    def undisturbed(processes):
        folder = tmp_path_factory.mktemp("whole") / "run"
        finish(twin, folder, processes)
        return folder

    return undisturbed


@pytest.fixture
def sft_twin(tmp_path):
    """Overrides for 12 steps of SFT over 3 epochs, logged every 5."""
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    changes = {
        "--max_steps": "-1", "--num_train_epochs": "3", "--global_batch_size": "8", "--per_device_train_batch_size": "4",
        "--max_train_samples": "30", "--save_strategy": "steps", "--save_steps": "2", "--logging_steps": "5",
    }  # fmt: skip
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True)) | changes
    return [text for pair in flags.items() for text in pair]


def start(overrides, output_dir, processes, *more, stage="rmipo"):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        more = (*more, "--deepspeed", "configs/deepspeed/zero3-cpu.json")
    script = {"sft": "sft", "rmipo": "preference"}[stage]
    command = [*launcher, f"scripts/{script}.py", "--config", f"recipes/tiny/{stage}.yaml", *overrides, *more]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--output_dir", str(output_dir)], cwd=REPOSITORY, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(overrides, output_dir, processes, *more, stage="rmipo"):
    process = start(overrides, output_dir, processes, *more, stage=stage)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    return output


def send_all(process, number):
    """A signal to the launcher and its workers, which torchrun starts in sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)


def kill_when(process, condition, timeout=120):
    """SIGKILL to the run while `condition()` holds; False if the run ended before.

    The run is frozen first and the condition looked at again, so that the kill is where it should be.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if condition():
            send_all(process, signal.SIGSTOP)
            if condition():
                send_all(process, signal.SIGKILL)
                process.wait()
                return True
            send_all(process, signal.SIGCONT)
        time.sleep(0.002)
    send_all(process, signal.SIGKILL)
    raise TimeoutError(f"the run never got to where it should be killed: {process.communicate()[0][-3000:]}")


def comparable_metrics(output_dir):
    return [
        {name: value for name, value in line.items() if name not in NOT_COMPARED and "runtime" not in name
         and not name.endswith("per_second")}
        for line in read_metrics(output_dir)
    ]  # fmt: skip


def assert_same_run(one, other):
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    assert comparable_metrics(one) == comparable_metrics(other)
    if (other / "generations.jsonl").exists():
        assert (one / "generations.jsonl").read_text() == (other / "generations.jsonl").read_text()
    last = checkpoints.complete_checkpoints(other)[-1].name
    files = [path for ending in ("pt", "bin") for path in (other / last).rglob(f"*.{ending}")]
    names = [path.relative_to(other / last) for path in files if path.name != "training_args.bin"]
    assert any("optim" in path.name for path in names) and Path("scheduler.pt") in names
    for name in names:  # sharded: each rank's share of weights, masters and moments
        with torch.serialization.safe_globals(checkpoints.classes_of_deepspeed()):
            ours, theirs = (torch.load(run / last / name, weights_only=True) for run in (one, other))
        assert_same_values(ours, theirs, str(name))


def assert_same_values(one, other, where):
    if torch.is_tensor(other):
        assert torch.equal(one, other), where
    elif isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in other.keys() - {"ds_version", "ds_config"}:
            assert_same_values(one[key], other[key], f"{where} {key}")
    elif isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same_values(*pair, f"{where} {number}")
    elif isinstance(other, str | int | float | bool):
        assert one == other, where


def last_step(output_dir):
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def in_the_middle_of_a_save(output_dir):
    return any(not (folder / MARKER).exists() for folder in output_dir.glob("checkpoint-*"))


def in_the_middle_of_an_evaluation(output_dir):
    """Between an evaluation's metrics and its sample generations."""

    def steps(name, sign):
        path = output_dir / name
        lines = path.read_text().splitlines() if path.exists() else []
        return {json.loads(line)["step"] for line in lines if line.endswith("}") and sign in line}

    return steps("metrics.jsonl", "eval_loss") > steps("generations.jsonl", "answer")


@pytest.mark.parametrize("processes", PROCESSES.values(), ids=PROCESSES)
def test_killed_in_an_epoch_an_evaluation_and_a_save(tmp_path, twin, whole, processes):
    whole, killed = whole(processes), tmp_path / "killed"
    assert [line["step"] for line in read_metrics(whole) if "loss" in line] == list(range(1, 16))

    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 3)
    assert kill_when(start(twin, killed, processes), lambda: in_the_middle_of_an_evaluation(killed))
    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 8 and in_the_middle_of_a_save(killed))
    (torn,) = [folder for folder in killed.glob("checkpoint-*") if not (folder / MARKER).exists()]
    output = finish(twin, killed, processes)
    assert "resuming from" in output, output[:4000]
    assert f"{torn} is incomplete: deleted" in output, output[:4000]
    assert_same_run(killed, whole)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("processes", PROCESSES.values(), ids=PROCESSES)
def test_killed_at_twenty_random_points(tmp_path, twin, whole, processes):
    """After a random step: in the next save, in the next evaluation, or up to 250 ms later, wherever that is."""
    whole = whole(processes)
    random_state = random.Random(processes)
    points = []
    while len(points) < 20:
        killed = tmp_path / f"killed-{len(points)}"
        step, wait = random_state.randint(0, 15), random_state.uniform(0, 0.25)
        where = random_state.choice([in_the_middle_of_a_save, in_the_middle_of_an_evaluation, None])
        reached = []

        def due():
            if last_step(killed) >= step and (killed / "run.json").exists():  # noqa: B023
                reached.append(time.monotonic())  # noqa: B023
            if not reached:  # noqa: B023
                return False
            return where(killed) if where else time.monotonic() - reached[0] >= wait  # noqa: B023

        process = start(twin, killed, processes)
        if not kill_when(process, due, timeout=300):
            shutil.rmtree(killed)  # it had ended by then
            continue
        finish(twin, killed, processes)
        assert_same_run(killed, whole)
        points.append(f"step {step}, {where.__name__ if where else f'{wait * 1000:.0f} ms later'}")
        print(f"{len(points)}: {points[-1]}: the same run", flush=True)


def test_sft_is_resumed_exactly_too(tmp_path, sft_twin):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(sft_twin, whole, 1, stage="sft")
    assert kill_when(start(sft_twin, killed, 1, stage="sft"), lambda: last_step(killed) >= 6)
    output = finish(sft_twin, killed, 1, stage="sft")
    assert "resuming from" in output
    assert_same_run(killed, whole)
    # A line with each checkpoint, besides every fifth step: none covers steps on both sides of a kill.
    assert [line["step"] for line in read_metrics(whole) if "loss" in line] == [2, 4, 5, 6, 8, 10, 12]


def test_a_wandb_run_is_continued_row_by_row(tmp_path, twin, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    killed, tracked = tmp_path / "killed", (*twin[: twin.index("--report_to")], *twin[twin.index("--report_to") + 2 :])
    tracked += ("--report_to", "wandb")
    assert kill_when(start(tracked, killed, 1), lambda: last_step(killed) >= 7)
    finish(tracked, killed, 1)
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    ids = {r.run.run_id for file in (first, second) for r in read_records(file) if r.HasField("run")}
    assert ids == {json.loads((killed / "run.json").read_text())["wandb_run_id"]}
    rows = [{row["_step"]: row for row in read_history(file)} for file in (first, second)]
    # The kill took W&B's own process too, with rows that it had not written: they are in the second file.
    assert list(rows[1]) == list(range(1, 16)) and len(read_history(second)) == 15
    for line in read_metrics(killed):
        prefix = "" if "eval_loss" in line else "train/"
        for name in ("loss", "rewards/margins", "rmipo/gamma_mean"):
            key = f"{prefix}{name}" if prefix else f"eval/{name}"
            value = line[name if prefix else f"eval_{name}"]
            assert rows[1][line["step"]][key] == pytest.approx(value, rel=1e-6)
    for step in rows[0].keys() & rows[1].keys():
        assert rows[0][step]["train/loss"] == rows[1][step]["train/loss"]


@pytest.mark.parametrize("method", ["alpha-dpo", "epsilon-dpo"])
def test_running_statistics_survive(tmp_path, twin, method):
    overlay = ("--overlay", f"recipes/methods/{method}.yaml", "--reference_cache_dir", str(tmp_path / "cache"))
    finish(twin, tmp_path / "whole", 1, *overlay)
    killed = tmp_path / "killed"
    assert kill_when(start(twin, killed, 1, *overlay), lambda: last_step(killed) >= 5)
    finish(twin, killed, 1, *overlay)
    assert_same_run(killed, tmp_path / "whole")
    saved = [(run / "checkpoint-14" / "objective_state.json").read_text() for run in (killed, tmp_path / "whole")]
    assert saved[0] == saved[1] and len(json.loads(saved[0])) >= 1


def test_sigterm_saves_and_exits_with_its_own_code(tmp_path, twin, whole):
    stopped = tmp_path / "stopped"
    process = start(twin, stopped, 1)
    while last_step(stopped) < 3:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == EXIT_STOPPED, output[-3000:]
    assert "the same command goes on from there" in output
    finish(twin, stopped, 1)
    weights, expected = (load_file(run / "model.safetensors") for run in (stopped, whole(1)))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


IDENTITY = run_identity({"learning_rate": 1e-6, "objective": {"name": "rmipo", "beta": 2.0}}, {"train": "a"}, 2)


@pytest.mark.parametrize(
    "other, message",
    [
        (run_identity({"learning_rate": 2e-6, "objective": {"name": "rmipo", "beta": 2.0}}, {"train": "a"}, 2),
         "recipe.learning_rate: 2e-06, now 1e-06"),
        (run_identity({"learning_rate": 1e-6, "objective": {"name": "dpo", "beta": 2.0}}, {"train": "a"}, 2),
         "recipe.objective.name: dpo, now rmipo"),
        (run_identity(IDENTITY["recipe"], {"train": "b"}, 2), "fingerprints.train: b, now a"),
        (run_identity(IDENTITY["recipe"], {"train": "a"}, 4), "world_size: 4, now 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["run.json", f"checkpoint-4/{MARKER}"])
def test_another_run_is_refused_by_what_differs(tmp_path, other, message, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps({"step": 4, **other}))
    with pytest.raises(CheckpointError, match=f"Different there:\n  {message}$"):
        resume_point(tmp_path, IDENTITY)


def make_checkpoints(folder, complete, torn=()):
    for step in (*complete, *torn):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "weights").write_text("x")
    for step in complete:
        (folder / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"step": step, **IDENTITY}))


def test_the_last_complete_checkpoint_is_taken(tmp_path):
    assert resume_point(tmp_path, IDENTITY) is None
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    make_checkpoints(tmp_path, complete=(2, 10, 4), torn=(12,))
    assert Path(resume_point(tmp_path, IDENTITY)).name == "checkpoint-10"
    assert differences(IDENTITY, IDENTITY) == []


def test_checkpoints_of_something_else_are_nobodys_to_delete(tmp_path):
    """Those of a plain Trainer, without our marker, in a folder without our run.json."""
    make_checkpoints(tmp_path, complete=(), torn=(500,))
    with pytest.raises(
        CheckpointError, match=r"is not empty, and there is no run\.json of a run in it. Found: checkpoint-500"
    ):
        resume_point(tmp_path, IDENTITY)


def test_a_checkpoint_of_the_model_alone_is_none_to_go_on_from(tmp_path):
    identity = run_identity(IDENTITY["recipe"] | {"save_only_model": True}, IDENTITY["fingerprints"], 2)
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert resume_point(tmp_path, identity) is None
    make_checkpoints(tmp_path, complete=(4,))
    with pytest.raises(CheckpointError, match=r"checkpoint-4 holds the model alone \(save_only_model: true\)"):
        resume_point(tmp_path, identity)


def test_old_checkpoints_go_only_when_the_new_one_is_complete(tmp_path):
    """Torn ones don't count: with a limit of 1, the only complete one stays until another has its marker."""
    make_checkpoints(tmp_path, complete=(6,), torn=(7, 8))
    rotate(tmp_path, 1)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-6"]
    make_checkpoints(tmp_path, complete=(9, 10))
    rotate(tmp_path, 1, keep=str(tmp_path / "checkpoint-9"))
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert not (tmp_path / "checkpoint-6").exists() and (tmp_path / "checkpoint-7").exists()


def test_what_changes_no_result_may_change_between_starts(tmp_path):
    recipe = {"ddp_timeout": 1800, "save_total_limit": 2, "report_to": ["none"], "learning_rate": 1e-6}
    before = run_identity(recipe, {"train": "a"}, 2)
    after = run_identity(recipe | {"ddp_timeout": 60, "save_total_limit": 1, "report_to": ["wandb"]}, {"train": "a"}, 2)
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert resume_point(tmp_path, after) is None
    with pytest.raises(CheckpointError, match=r"recipe\.learning_rate: 1e-06, now 2e-06$"):
        resume_point(tmp_path, run_identity(recipe | {"learning_rate": 2e-6}, {"train": "a"}, 2))
