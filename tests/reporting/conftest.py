"""Scripts of this room, run in the tests' own process: importing torch and transformers once is enough."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

VARIABLES = ("N", "TABLE", "MODEL", "METHOD", "METRIC", "ARGS", "DATA", "SLURM", "DRY", "STAGE", "BENCH")
VARIABLES += ("WINS", "AGAINST", "EVAL_NAME")


@pytest.fixture
def run_script(monkeypatch) -> Callable[..., int]:
    """(name, *arguments, folder, **environment) -> exit code of scripts/<name>, run in `folder`."""

    def run(name: str, *arguments: str, folder: Path, **environment: str) -> int:
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / name), *arguments])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
            return ended.code if isinstance(ended.code, int) else 1
        return 0

    return run
