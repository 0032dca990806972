"""All scripts have one manner: options, --help, how they end. `make doctor` and `make smoke` say what is missing or fails."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import transformers.integrations.integration_utils  # noqa: F401  (it prints a line where W&B is offline, once)

from rmipo import cli
from rmipo.errors import UserError
from rmipo.launch.pipeline import load_steps
from rmipo.plan.memory import Hardware
from tests.helpers.launched import launch, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.rows import write

FREE_FORM = {"pairs", "online"}  # their options are keys of their YAML files
SCRIPTS = sorted({path.stem for path in ROOT.glob("scripts/*.py")} - FREE_FORM)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does(script):
    ended = run_here(script, "--help")
    assert ended.code == 0 and ended.err == ""
    usage, _, rest = ended.out[ended.out.index("usage: ") :].partition("\n\n")  # after what libraries print
    assert usage.startswith(f"usage: {script}.py") and len(rest.splitlines()[0]) > 40


def test_options_default_to_makes_variables(monkeypatch):
    monkeypatch.setenv("MODEL", "tiny")
    monkeypatch.setenv("METHOD", "dpo")
    monkeypatch.setattr(sys, "argv", ["x.py", "--method", "simpo"])
    assert cli.variables(cli.options("x", "MODEL", "METHOD", "DATA").read()) == {"MODEL": "tiny", "METHOD": "simpo"}
    monkeypatch.setenv("ARGS", "--method 'a b' --model other")
    assert cli.variables(cli.options("x", "MODEL", "METHOD").read()) == {"MODEL": "other", "METHOD": "simpo"}
    with pytest.raises(UserError, match=r"unrecognized arguments: --models y. `x.py --help` shows"):
        monkeypatch.setattr(sys, "argv", ["x.py", "--models", "y"])
        cli.options("x", "MODEL", "ARGS").read()


CHILD = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(1e6)"
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
from rmipo import cli
from rmipo.launch.train import Program
cli.main(lambda: Program().run([sys.executable, "-c", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_passed_on_and_a_second_one_ends_all_at_once(tmp_path, times):
    """SIGINT to the launcher alone, as `kill -INT` sends it: nothing is left running."""
    started, asked = tmp_path / "started", tmp_path / "asked"
    end = "sys.exit(130)" if times == 1 else f"open({str(asked)!r}, 'w')"
    program = (
        f"import signal, subprocess, sys\nsignal.signal(signal.SIGINT, lambda *_: {end})\n"
        f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}, sys.argv[1]], start_new_session={times == 2})\n"
        "while True: child.wait()\n"
    )
    run = launch(["-c", PARENT, program, str(started)])
    wait_until(started.exists, run)
    for number in range(times):
        os.kill(run.processes[0].pid, signal.SIGINT)
        if number + 1 < times:
            wait_until(asked.exists, run)
    assert run.wait() == {1: 130, 2: 128 + signal.SIGKILL}[times], run.output
    assert "Traceback" not in run.output
    while subprocess.run(["pgrep", "-f", str(started)], capture_output=True).stdout:
        time.sleep(0.1)


SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Runs it without a network; gives (exit code, {check: line})."""
    monkeypatch.delenv("WANDB_MODE")

    def run(**variables):
        ended = run_here("doctor", env=variables)
        return ended.code, {line[6:].split("  ")[0].strip(): line for line in ended.out.splitlines()}

    return run


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_tiny_needs_nothing_an_8b_setting_fails_here_and_every_line_names_its_fix(doctor):
    code, lines = doctor(MODEL="tiny")
    assert code == 0 and not [line for line in lines.values() if line.startswith("FAIL")]
    assert lines["disk rmipo"].startswith("note ")  # the SFT model is not here to compare with
    code, lines = doctor(MODEL="llama3-8b-instruct", HF_HUB_CACHE="/nonexistent")
    assert code == 1
    failed = [line for line in lines.values() if line.startswith("FAIL")]
    assert {"GPU", "model", "dataset", "W&B login"} <= {line[6:].split("  ")[0].strip() for line in failed}
    assert all("Fix: " in line or "Free some" in line for line in failed)


def test_wandb_is_looked_for_among_several_trackers_and_no_secret_is_shown(doctor):
    for trackers, status in (("'[wandb, tensorboard]'", "FAIL"), ("none", "note")):
        _, lines = doctor(MODEL="tiny", STAGE="rmipo", ARGS=f"--report_to {trackers}")
        assert lines["W&B login"].split()[0] == status
    _, lines = doctor(MODEL="llama3-8b-instruct", **SECRETS)
    assert not [name for name, value in SECRETS.items() if value[:12] in str(lines)]


def test_what_is_trained_already_needs_no_disk_and_another_run_is_named(doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    env = {"MODEL": "tiny", "STAGE": "rmipo", "ARGS": f"--output_dir {tmp_path / 'run'}"}
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "run.json"
    recipe = load_steps("tiny", ["rmipo"], env)[0].recipe.resolved()
    record.write_text(json.dumps({"finished": True, "recipe": recipe}))
    code, lines = doctor(**env)
    assert code == 0 and lines["disk run"].endswith("/run is trained already")
    record.write_text(json.dumps({"finished": True, "recipe": recipe | {"seed": 7}}))
    code, lines = doctor(**env)
    assert code == 1 and "holds a run of another recipe" in lines["disk run"]


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


def test_smoke_compares_memory_with_the_plan_and_finds_a_run_that_started_from_the_beginning_again(
    tmp_path, monkeypatch
):
    """Llama-3-8B on four A100: about 41 GiB. Two of the four have 34 GiB of states each in place of 17."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Hardware, "here", lambda: Hardware(4, 79.1))
    smoke = runpy.run_path(str(ROOT / "scripts/smoke.py"))
    (step,) = load_steps("llama3-8b-instruct", ["rmipo"], {"ARGS": f"--output_dir {tmp_path}"})
    for gpus, peak, passed in ((4, 40, True), (4, 75, False), (2, 75, True)):
        write(tmp_path / "metrics.jsonl", [{"step": n, "loss": 1.0, "peak_memory_gib": peak} for n in range(1, 11)])
        (tmp_path / "run.json").write_text(json.dumps({"starts": 1, "results": {"parity": 0.0}}))
        checks = {name: passed for name, passed, _ in smoke["checks"](step, gpus, (75, 0))}
        assert checks == {"parity": True, "resume": False, "export": False, "memory": passed}
