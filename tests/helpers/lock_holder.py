"""Another process that holds the lock of a folder, and has a child that outlives it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT

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
