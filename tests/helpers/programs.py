"""The repository's scripts, run as users run them."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Mapping
from typing import NamedTuple
from unittest import mock

from tests.helpers.paths import ROOT


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run_here(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Ended:
    """`python scripts/<script>.py ...` inside this process: no import is paid for again, and monkeypatches reach it.

    For programs that print and refuse. What trains changes global state: use `start` for it.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"scripts/{script}.py", *arguments]),
        mock.patch.dict(os.environ, env or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):  # sys.exit(message)
        err.write(f"{code}\n")
        code = 1
    return Ended(code, out.getvalue(), err.getvalue())
