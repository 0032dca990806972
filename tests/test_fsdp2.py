"""FSDP2 as configs/accelerate/fsdp2.yaml starts it, on two CPU processes: the same run as in one process, resumable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rmipo.tracking import read_metrics
from tests.test_resume import assert_same_run, kill_when, last_step, twin  # noqa: F401 (twin is a fixture)
from tests.test_twins import REPOSITORY, run


def start(overrides, output_dir):
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "configs/accelerate/fsdp2.yaml",
        "--num_processes", "2", "tests/fsdp2_on_cpus.py", "scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml",
    ]  # fmt: skip
    return subprocess.Popen(
        [*command, *overrides, "--output_dir", str(output_dir)], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(overrides, output_dir):
    process = start(overrides, output_dir)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    return output


def test_fsdp2_trains_as_one_process_does_and_resumes_exactly(tmp_path, twin):  # noqa: F811
    alone = run("tiny/rmipo", twin, tmp_path / "alone", zero3=False)
    output = finish(twin, tmp_path / "sharded")
    assert "2 processes share 21 parameters" in output, output[-3000:]
    sharded = [line for line in read_metrics(tmp_path / "sharded") if "loss" in line]
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in alone], abs=2e-5)
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-3)
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "alone"))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=0, msg=name)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    killed = tmp_path / "killed"
    assert kill_when(start(twin, killed), lambda: last_step(killed) >= 7)
    assert "resuming from" in finish(twin, killed)
    assert_same_run(killed, tmp_path / "sharded")
