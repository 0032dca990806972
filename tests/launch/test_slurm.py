"""scripts/launch.slurm on a real Slurm of two nodes: a run over both, requeued midway, ends with the same weights.

Needs Debian's slurm-wlm and munge (`apt-get install slurm-wlm munge`); skipped without. The requeue, a minute:
    .venv/bin/python -m pytest -m "slurm and not slow"
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file

from rmipo.launch.environment import DEFAULTS, training_environment
from rmipo.launch.pipeline import Step
from rmipo.launch.train import submit
from rmipo.recipe.load import load_recipe
from rmipo.record import read_metrics
from rmipo.training.checkpoints import MARKER
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.slurm_cluster import cluster, installed, slurm, wait_for
from tests.helpers.twins import make_twin

STEPS = 100


def shown(job, key):
    """What `scontrol show job` says after `key`=; None for a job that it doesn't know."""
    values = re.findall(rf"\b{key}=(\S+)", slurm(dict(os.environ), "scontrol", "show", "job", job))
    return values[0] if values else None


def finished(job):
    """The job's state once it has ended, else None. A requeued job is pending again."""
    state = shown(job, "JobState")
    return state if state not in (None, "PENDING", "RUNNING", "COMPLETING", "CONFIGURING") else None


def train(overrides, output_dir, disturb=None, end="COMPLETED"):
    """Train on both nodes; `disturb(job, step)` is called in the middle. Returns (how often it was started, its log)."""
    path, overrides = "recipes/tiny/rmipo.yaml", [*overrides, "--output_dir", str(output_dir)]
    step = Step("rmipo", ["--config", path, *overrides], load_recipe(ROOT / path, overrides=overrides))
    job, log = submit(step, nodes=2, gpus=0)
    try:
        if disturb is not None:
            checkpoint = wait_for(lambda: next(output_dir.glob(f"checkpoint-*/{MARKER}"), None), 250)
            assert int(checkpoint.parent.name.split("-")[1]) < STEPS / 2
            disturb(job, step)
        state = wait_for(lambda: finished(job), 240)
        text = log.read_text()
        assert state == end, text[-6000:]
        ranks = {path.relative_to(log.with_suffix("")).parts[1] for path in log.with_suffix("").rglob("stdout.log")}
        assert ranks == {"node-0", "node-1"}
        return len(re.findall(r"^start \d+ on n\[1-2\]", text, re.MULTILINE)), text
    finally:
        log.unlink(missing_ok=True)
        shutil.rmtree(log.with_suffix(""), ignore_errors=True)


def end_for_good(job, step):
    """Cancel the job, and before that see that it has its nodes whole, and that a second one of its name waits."""
    environment = dict(os.environ)
    assert (shown(job, "OverSubscribe"), shown(job, "NumCPUs"), shown(job, "MinMemoryNode")) == ("NO", "2", "0")
    second, _ = submit(step, nodes=2, gpus=0)
    wait_for(lambda: shown(second, "Reason") == "Dependency", 20)
    slurm(environment, "scancel", second)
    slurm(environment, "scancel", job)


@pytest.fixture
def overrides(tmp_path, monkeypatch):
    """Of a run of 100 steps that saves every 10, while a cluster is there to submit it to."""
    if not installed():
        pytest.skip("slurm-wlm and munge are not installed")
    monkeypatch.chdir(ROOT)
    flags = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    flags = dict(zip(flags[::2], flags[1::2], strict=True)) | {
        "--max_steps": str(STEPS), "--save_strategy": "steps", "--save_steps": "10", "--global_batch_size": "8",
        "--per_device_train_batch_size": "2", "--lr_scheduler_type": "cosine",
    }  # fmt: skip
    with cluster(tmp_path / "slurm") as environment:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, environment[name])
        yield [text for pair in flags.items() for text in pair]


def assert_same_weights(run, undisturbed):
    wanted, weights = (load_file(folder / "model.safetensors") for folder in (undisturbed, run))
    started = load_file(run.parent / "model" / "model.safetensors")
    assert max((wanted[name] - started[name]).abs().max() for name in wanted) > 1e-2
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses == [line["loss"] for line in read_metrics(undisturbed) if "loss" in line]
    assert len(losses) == STEPS


@pytest.mark.slurm
def test_a_requeued_run_ends_with_the_weights_of_the_undisturbed_one(tmp_path, overrides):
    """What an administrator or a preemption does. The undisturbed run is of two processes without Slurm."""
    command = ["scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml", *overrides]
    undisturbed = launch([*command, "--output_dir", str(tmp_path / "undisturbed")], processes=2)
    assert undisturbed.wait() == 0, undisturbed.output[-6000:]
    requeue = ("scontrol", "requeue")
    starts, _ = train(overrides, tmp_path / "requeued", lambda job, _: slurm(dict(os.environ), *requeue, job))
    assert starts == 2
    assert_same_weights(tmp_path / "requeued", tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.slurm
def test_stops_with_notice_requeue_too_and_scancel_ends_for_good(tmp_path, overrides):
    train(overrides, tmp_path / "undisturbed")
    # What happens before the time limit.
    before_the_limit = ("scancel", "--batch", "--signal=USR1")
    starts, log = train(overrides, tmp_path / "asked", lambda job, _: slurm(dict(os.environ), *before_the_limit, job))
    assert starts == 2 and "asked to stop: saving, then back into the queue" in log
    assert_same_weights(tmp_path / "asked", tmp_path / "undisturbed")
    # What a preemption with a grace time does: the processes alone are signalled.
    preempt = ("scancel", "--signal=TERM")
    starts, _ = train(overrides, tmp_path / "preempted", lambda job, _: slurm(dict(os.environ), *preempt, f"{job}.0"))
    assert starts == 2
    assert_same_weights(tmp_path / "preempted", tmp_path / "undisturbed")
    # A user's `scancel`, which sends the same signal, is not undone.
    starts, _ = train(overrides, tmp_path / "cancelled", end_for_good, end="CANCELLED")
    assert starts == 1


def on_a_node(folder, accelerate, *arguments, **environment):
    """Output of the node's part of the script, with the shell text `accelerate` as that program."""
    node = {"RMIPO_HEAD_NODE": "first", "SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_NODEID": "2"}
    node |= {"SLURM_GPUS_PER_NODE": "a100:8", "SLURM_GPUS_ON_NODE": "16"}  # of a node that is taken whole
    programs = {"accelerate": accelerate, "python": f'exec "{sys.executable}" "$@"'}
    (folder / ".venv/bin").mkdir(parents=True)
    for name, text in programs.items():
        (folder / ".venv/bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    (folder / "rmipo").symlink_to(ROOT / "rmipo")
    done = subprocess.run(
        ["bash", ROOT / "scripts/launch.slurm", *arguments], cwd=folder, env=os.environ | node | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_accelerate_meets_at_the_head_node(tmp_path, monkeypatch, sharding):
    """The node's part of the script, with a program in accelerate's place that records its arguments."""
    monkeypatch.chdir(ROOT)
    config = f"configs/accelerate/{sharding}.yaml"
    program = ["scripts/preference.py", "--config", "a b.yaml"]
    command, *arguments = on_a_node(tmp_path, 'printf "%s\\n" "$@"', config, *program).splitlines()
    assert command == "launch"
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    launch_command(launch_command_parser().parse_args(arguments))
    (args,) = started
    assert [args.training_script, *args.training_script_args] == program
    assert (args.nnodes, args.nproc_per_node) == ("4", "8")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "first:20007")
    assert args.log_dir == "outputs/slurm/7/start-0/node-2" and args.tee == "3"


@pytest.mark.parametrize("sharding", ["zero3", "zero3-offload"])
def test_a_node_has_the_environment_of_make_train(tmp_path, monkeypatch, sharding):
    for name in (*DEFAULTS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    program = (f"configs/accelerate/{sharding}.yaml", "scripts/preference.py")
    lines = on_a_node(tmp_path, "exec env", *program, WANDB_PROJECT="mine").splitlines()
    found = dict(line.split("=", 1) for line in lines)
    expected = training_environment({"WANDB_PROJECT": "mine"}, sharding, processes=8)
    assert {name: found.get(name) for name in expected} == expected
    assert expected["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert ("OMP_NUM_THREADS" in found) == ("OMP_NUM_THREADS" in expected) == (sharding == "zero3-offload")
    notice = re.search(r"--signal=B:USR1@(\d+)", (ROOT / "scripts/launch.slurm").read_text())
    assert int(DEFAULTS["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < int(notice[1])  # there is time to save before the limit
