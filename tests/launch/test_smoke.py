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
    found = [line.split()[:2] for line in done.stdout.splitlines()[-5:-1]]
    assert found == [["pass", "parity"], ["pass", "resume"], ["pass", "export"], ["skip", "memory"]]
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


@pytest.mark.parametrize(("gpus", "peak", "passed"), [(4, 40, True), (4, 75, False), (2, 75, True)])
def test_memory_is_compared_with_the_plan(smoke, step, tmp_path, gpus, peak, passed):
    """Llama-3-8B on four A100: about 41 GiB. Two of the four have 34 GiB of states each in place of 17."""
    write_steps(tmp_path, peak_memory_gib=peak)
    assert smoke["memory_check"](step, gpus)[1] is passed


def test_a_run_that_started_again_from_the_beginning_fails(smoke, tmp_path):
    write_steps(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"starts": 1, "results": {"parity": 0.0}}))
    checks = {name: passed for name, passed, *_ in smoke["run_checks"](tmp_path, (75, 0))}
    assert checks == {"parity": True, "resume": False, "export": False}
