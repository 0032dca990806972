"""`make smoke`: passes on this CPU, and says what fails, with exit code 1."""

import json
import os
import runpy
import subprocess

import pytest

from rmipo.errors import UserError
from rmipo.plan import preflight
from rmipo.plan.gpus import A100, HOPPER, Speed, speed_of, speed_with
from rmipo.plan.memory import Hardware
from rmipo.recipe.load import load_recipe
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


@pytest.mark.parametrize(
    ("gpus", "peak", "speed", "passed"),
    [(4, 40, 16e3, [True, True]), (4, 75, 2e3, [False, False]), (2, 75, 8e3, [True, True])],
)
def test_memory_and_speed_are_compared_with_the_plan(smoke, tmp_path, monkeypatch, gpus, peak, speed, passed):
    """Llama-3-8B on four A100: about 41 GiB, and 2 x 8e9 x 3.5 FLOPs a token leave about 22,000 tokens/s at the peak.

    Two of the four have 34 GiB of states each in place of 17, and half the peak.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 4, 80.0, 500.0))
    write_steps(tmp_path, peak_memory_gib=peak, tokens_per_second=speed)
    recipe = load_recipe("recipes/llama3-8b-instruct/rmipo.yaml")
    checks = smoke["hardware_checks"](recipe, tmp_path, gpus, "", A100)
    assert [check.passed for check in checks] == passed


def test_a_healthy_h100_passes_and_a_slow_one_does_not(smoke, tmp_path, monkeypatch):
    """22,000 tokens/s are the peak of four A100: four H100 at 33% of theirs make 23,000, at 11% 7,700."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 4, 79.2, 500.0))
    recipe = load_recipe("recipes/llama3-8b-instruct/rmipo.yaml")
    for speed, passed in ((23e3, True), (7.7e3, False)):
        write_steps(tmp_path, peak_memory_gib=40, tokens_per_second=speed)
        *_, check = smoke["hardware_checks"](recipe, tmp_path, 4, "", speed_of("NVIDIA H100 80GB HBM3"))
        assert check.passed is passed
    *_, check = smoke["hardware_checks"](recipe, tmp_path, 4, "", speed_of("NVIDIA B300"))
    assert check.passed is None and "TFLOPS" in check.found


def test_the_peak_follows_from_the_name():
    assert speed_of("NVIDIA A100-SXM4-80GB") == speed_of("NVIDIA A800 80GB PCIe") == A100
    assert speed_of("NVIDIA H200").tflops == 989 and speed_of("NVIDIA H100 PCIe").tflops == 756
    assert speed_with(989.0) == Speed(989.0, HOPPER) and speed_with(312.0) == A100


def test_a_tflops_that_is_no_number_is_refused_before_anything_runs(smoke, monkeypatch):
    monkeypatch.setattr("sys.argv", ["smoke.py"])
    for name, value in {"MODEL": "tiny", "TFLOPS": "fast"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(smoke["main"].__globals__, "own_arguments", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match="TFLOPS=fast: expected a number above 0"):
        smoke["main"]()


def test_a_run_that_started_again_from_the_beginning_fails(smoke, tmp_path, monkeypatch):
    write_steps(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"starts": 1, "results": {"parity": 0.0}}))
    checks = {check.name: check.passed for check in smoke["run_checks"](tmp_path, (75, 0))}
    assert checks == {"parity": True, "resume": False, "export": False}
