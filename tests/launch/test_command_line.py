"""All scripts have one manner: options, --help, how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import transformers.integrations.integration_utils  # noqa: F401  (it prints a line where W&B is offline, once)

from rmipo import cli
from rmipo.errors import UserError
from rmipo.launch.choices import split_args
from tests.helpers.launched import launch, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here

FREE_FORM = {"pairs", "online"}  # their options are keys of their YAML files
SCRIPTS = sorted({path.stem for path in ROOT.glob("scripts/*.py")} - FREE_FORM)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does_and_every_option_means(script):
    ended = run_here(script, "--help")
    assert ended.code == 0 and ended.err == ""
    shown = ended.out[ended.out.index("usage: ") :]  # after what libraries print as they are imported
    usage, _, rest = shown.partition("\n\n")
    summary, _, options = rest.partition("options:\n")
    assert usage.startswith(f"usage: {script}.py") and len(summary.splitlines()[0]) > 40
    undocumented = [
        line for line, after in zip(options.splitlines(), [*options.splitlines()[1:], ""], strict=True)
        if line.startswith("  -") and len(line.split("  ")) < 3 and not after.startswith("        ")
    ]  # fmt: skip
    assert undocumented == []
    assert max(map(len, shown.splitlines())) <= 128


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


def test_the_home_is_found_wherever_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {"DATA": "~/pairs", "ARGS": "--overlay ~/a.yaml --settings=~/eval.yaml"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["x.py", "--output", "~/out", "--model=a~/b"])
    read = cli.variables(cli.options("x", "DATA", "OUTPUT", "MODEL", "ARGS").read())
    assert read["DATA"] == f"{tmp_path}/pairs" and read["OUTPUT"] == f"{tmp_path}/out" and read["MODEL"] == "a~/b"
    assert split_args(read) == ([f"{tmp_path}/a.yaml"], [f"--settings={tmp_path}/eval.yaml"])


CHILD = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(1e6)"
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
from rmipo import cli
from rmipo.launch.train import Program
cli.run(lambda: Program().run([sys.executable, "-c", *sys.argv[1:]]))
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


def test_a_reader_that_has_seen_enough_ends_a_program_quietly():
    code = "from rmipo import cli\ncli.run(lambda: [print('line ' * 99, flush=True) for _ in range(9999)] and None)"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.readline()
    program.stdout.close()
    assert program.wait() == 0 and program.stderr.read() == ""
