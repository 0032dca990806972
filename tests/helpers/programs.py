"""Scripts, run as users run them; recipes that are wrong, or a user's own; a process that holds the lock of a folder."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from rmipo.errors import ConfigError
from rmipo.recipe.load import load_recipe
from tests.helpers.isolation import CHECKOUT
from tests.helpers.paths import ROOT


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run_here(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, root: Path = ROOT, folder: Path | None = None
) -> Ended:
    """`python scripts/<script>.py ...` inside this process: no import is paid for again, and monkeypatches reach it.

    It runs in `root`, whose script it is, or in `folder`. For programs that print and refuse: what trains changes global state.
    """
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", [f"scripts/{script}.py", *arguments]),
        mock.patch.dict(os.environ, env or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder or root),
    ):
        try:
            runpy.run_path(str(root / f"scripts/{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    if isinstance(code, str):  # sys.exit(message)
        err.write(f"{code}\n")
        code = 1
    return Ended(code, out.getvalue(), err.getvalue())


HOLDER = """
import os, sys, time
from pathlib import Path
from rmipo.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as data loaders are; it outlives its parent
        time.sleep(5)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def problems(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)


def edited_recipes() -> set[str]:
    command = ["git", "status", "--porcelain", "--untracked-files=all", "--no-renames", "recipes"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    return {line[3:] for line in done.stdout.splitlines()}
