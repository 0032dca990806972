"""Killed with SIGKILL anywhere and started again, a run ends where the undisturbed one does: bit for bit, on the CPU."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rmipo.checkpoints import EXIT_STOPPED, MARKER, CheckpointError, differences, resume_point, run_identity
from rmipo.tracking import read_metrics
from tests.test_twins import REPOSITORY, make_twin

NOT_COMPARED = ("tokens_per_second", "peak_memory_gib")
PROCESSES = {"one process": 1, "ZeRO-3 on two": 2}


@pytest.fixture
def twin(tmp_path):
    """Overrides for a run of 15 steps over 3 epochs: 35 pairs, which the global batch of 8 doesn't divide."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    changes = {
        "--max_steps": "-1", "--num_train_epochs": "3", "--global_batch_size": "8", "--per_device_train_batch_size": "2",
        "--max_train_samples": "35", "--eval_strategy": "steps", "--eval_steps": "4", "--save_strategy": "steps",
        "--save_steps": "2", "--lr_scheduler_type": "cosine", "--logging_steps": "1",
    }  # fmt: skip
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True)) | changes
    return [text for pair in flags.items() for text in pair]


def start(overrides, output_dir, processes, *more):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        more = (*more, "--deepspeed", "configs/deepspeed/zero3-cpu.json")
    command = [*launcher, "scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml", *overrides, *more]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--output_dir", str(output_dir)], cwd=REPOSITORY, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(overrides, output_dir, processes, *more):
    process = start(overrides, output_dir, processes, *more)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    return output


def kill_all(process):
    """SIGKILL to the launcher and its workers, which torchrun starts in sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def kill_when(process, condition, timeout=120):
    """SIGKILL to the run once `condition()` holds; False if the run ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if condition():
            kill_all(process)
            return True
        time.sleep(0.002)
    kill_all(process)
    raise TimeoutError("the run never got to where it should be killed")


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
    assert (one / "generations.jsonl").read_text() == (other / "generations.jsonl").read_text()
    last = max(int(path.name.split("-")[1]) for path in other.glob("checkpoint-*"))
    states = [torch.load(run / f"checkpoint-{last}" / "scheduler.pt") for run in (one, other)]
    assert states[0] == states[1]
    if (other / f"checkpoint-{last}" / "optimizer.pt").exists():
        ours, theirs = (torch.load(run / f"checkpoint-{last}" / "optimizer.pt")["state"] for run in (one, other))
        for index, moments in theirs.items():
            for name, value in moments.items():
                assert torch.equal(ours[index][name], value), (index, name)


def last_step(output_dir):
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def in_the_middle_of_a_save(output_dir):
    return any(not (folder / MARKER).exists() for folder in output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize("processes", PROCESSES.values(), ids=PROCESSES)
def test_killed_mid_epoch_and_during_a_save(tmp_path, twin, processes):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(twin, whole, processes)
    assert [line["step"] for line in read_metrics(whole) if "loss" in line] == list(range(1, 16))

    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 7)
    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 8 and in_the_middle_of_a_save(killed))
    if not in_the_middle_of_a_save(killed):  # the marker was written between the look and the kill
        newest = max(killed.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
        (newest / MARKER).unlink()
    output = finish(twin, killed, processes)
    assert "resuming from" in output, output[:4000]
    assert "incomplete: skipped" in output, output[:4000]
    assert_same_run(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", PROCESSES.values(), ids=PROCESSES)
def test_killed_at_twenty_random_points(tmp_path, twin, processes):
    whole = tmp_path / "whole"
    began = time.monotonic()
    finish(twin, whole, processes)
    duration = time.monotonic() - began
    random_state = random.Random(processes)
    for point in range(20):
        killed = tmp_path / f"killed-{point}"
        moment = random_state.uniform(0.3, 1.0) * duration
        began = time.monotonic()
        process = start(twin, killed, processes)
        kill_when(process, lambda: time.monotonic() - began > moment)  # noqa: B023
        finish(twin, killed, processes)
        assert_same_run(killed, whole)
        print(f"killed after {moment:.1f} s of {duration:.1f} s: the same run", flush=True)


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


def test_sigterm_saves_and_exits_with_its_own_code(tmp_path, twin):
    finish(twin, tmp_path / "whole", 1)
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
    weights, expected = (load_file(run / "model.safetensors") for run in (stopped, tmp_path / "whole"))
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


def test_the_last_complete_checkpoint_is_taken(tmp_path, capsys):
    assert resume_point(tmp_path, IDENTITY) is None
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"step": step, **IDENTITY}))
    (tmp_path / "checkpoint-12").mkdir()
    assert Path(resume_point(tmp_path, IDENTITY)).name == "checkpoint-10"
    assert "checkpoint-12 is incomplete: skipped" in capsys.readouterr().out
    assert differences(IDENTITY, IDENTITY) == []
