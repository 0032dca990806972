"""FSDP2 as configs/accelerate/fsdp2.yaml starts it, on two CPU processes: the same run as in one process, resumable."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rmipo.record import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.twins import assert_same_run, kill_when, last_step

pytestmark = pytest.mark.slow


class Started(subprocess.Popen):
    def __init__(self, command):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, **streams
        )

    def send(self, number):
        """To the launcher and its workers, which it starts in sessions of their own."""
        for victim in [*psutil.Process(self.pid).children(recursive=True), self]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(number)

    def end(self):
        self.send(signal.SIGKILL)
        self.wait()


def start(overrides, output_dir):
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "configs/accelerate/fsdp2.yaml",
        "--num_processes", "2", "tests/helpers/fsdp2_on_cpus.py",
        "scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml",
    ]  # fmt: skip
    return Started([*command, *overrides, "--output_dir", str(output_dir)])


def finish(overrides, output_dir):
    run = start(overrides, output_dir)
    output, _ = run.communicate()
    assert run.returncode == 0, output[-6000:]
    return output


def test_fsdp2_trains_as_one_process_does(tmp_path, twin, whole):
    alone, sharded = whole(1), tmp_path / "sharded"
    output = finish(twin, sharded)
    assert "2 processes share 21 parameters" in output, output[-3000:]
    assert "21 of 21 gradients are divided" in output, output[-3000:]  # after the first of two micro-batches
    lines, expected_lines = ([line for line in read_metrics(run) if "loss" in line] for run in (sharded, alone))
    for name, tolerance in (("loss", {"abs": 2e-5}), ("grad_norm", {"rel": 1e-3})):
        values = [line[name] for line in expected_lines]
        assert [line[name] for line in lines] == pytest.approx(values, **tolerance)
    weights, expected = (load_file(run / "model.safetensors") for run in (sharded, alone))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=0, msg=name)
    _, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_fsdp2_resumes_exactly(tmp_path, twin):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(twin, whole)
    assert kill_when(start(twin, killed), lambda: last_step(killed) >= 7)
    assert "resuming from" in finish(twin, killed)
    assert_same_run(killed, whole)
