import shutil
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what `make train` reads, whose environment is the running one."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("rmipo", "recipes", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/.installed").touch()
    return folder
