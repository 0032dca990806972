"""`make smoke`: passes on this CPU, and says what fails, with exit code 1."""

import json
import os
import runpy
import subprocess

import pytest

from rmipo.launch.pipeline import load_steps
from rmipo.plan.memory import Hardware
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def smoke():
    return runpy.run_path(str(ROOT / "scripts/smoke.py"))


def write_steps(folder, **columns):
    lines = [{"step": step, "loss": 1.0, **columns} for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_smoke_passes_on_a_cpu_and_a_broken_run_fails(repository):
    script = repository / "scripts/preference.py"
    whole = script.read_text()
    environment = os.environ | {"PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "smoke"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split()[:2] for line in done.stdout.splitlines()[-6:-1]]
    assert found == [
        ["pass", "parity"],
        ["pass", "resume"],
        ["pass", "export"],
        ["skip", "memory"],
        ["skip", "tokens/s"],
    ]
    assert not (repository / "outputs/tiny/rmipo").exists()

    script.write_text("raise SystemExit(3)\n")
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    script.write_text(whole)
    assert "Error 1" in done.stderr  # make's word for the program's exit code
    assert done.stdout.splitlines()[-1] == "tiny: failed: parity, resume, export"


@pytest.fixture
def step(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Hardware, "here", lambda: Hardware(1, 4, 79.1))
    (step,) = load_steps("llama3-8b-instruct", ["rmipo"], {"ARGS": f"--output_dir {tmp_path}"})
    return step


@pytest.mark.parametrize(
    ("gpus", "peak", "speed", "passed"),
    [(4, 40, 16e3, [True, True]), (4, 75, 2e3, [False, False]), (2, 75, 8e3, [True, True])],
)
def test_memory_and_speed_are_compared_with_the_plan(smoke, step, tmp_path, gpus, peak, speed, passed):
    """Llama-3-8B on four A100: about 41 GiB, and 2 x 8e9 x 3.5 FLOPs a token leave about 22,000 tokens/s at the peak.

    Two of the four have 34 GiB of states each in place of 17, and half the peak.
    """
    write_steps(tmp_path, peak_memory_gib=peak, tokens_per_second=speed)
    assert [check.passed for check in smoke["hardware_checks"](step, gpus, 312.0)] == passed


@pytest.mark.parametrize(
    ("name", "speed", "passed"),
    [("NVIDIA H100 80GB HBM3", 23e3, True), ("NVIDIA H100 80GB HBM3", 7.7e3, False), ("NVIDIA B300", 23e3, None)],
)
def test_the_peak_is_that_of_the_gpu_here(smoke, step, tmp_path, monkeypatch, name, speed, passed):
    """22,000 tokens/s are the peak of four A100: four H100 at 33% of theirs make 23,000, at 11% 7,700."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    write_steps(tmp_path, peak_memory_gib=40, tokens_per_second=speed)
    *_, check = smoke["hardware_checks"](step, 4, None)
    assert check.passed is passed


def test_a_run_that_started_again_from_the_beginning_fails(smoke, tmp_path):
    write_steps(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"starts": 1, "results": {"parity": 0.0}}))
    checks = {check.name: check.passed for check in smoke["run_checks"](tmp_path, (75, 0))}
    assert checks == {"parity": True, "resume": False, "export": False}
