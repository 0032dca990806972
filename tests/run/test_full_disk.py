"""A disk that fills up during a save, for real: a file system of a few megabytes, which only root can mount."""

import contextlib
import re
import subprocess
import sys

import pytest

from rmipo.training.checkpoints import MARKER
from tests.helpers.interrupted_runs import assert_same_run, finish, start


@contextlib.contextmanager
def small_disk(folder, kib):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kib", [1000, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(tmp_path, twin, whole, kib):
    out = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", kib):
        run = start(twin, out, 1)
        assert run.wait() == 2, run.output[-6000:]
        output = run.output
        assert "Traceback" not in output
        good = sorted(int(marker.parent.name.split("-")[1]) for marker in out.glob(f"checkpoint-*/{MARKER}"))
        named = re.search(r"error: the disk of .* is full; (\S+) is", output)
        assert named and named[1] == (f"checkpoint-{good[-1]}" if good else "there"), output[-3000:]

        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        output = finish(twin, out, 1)
        assert not good or f"resuming from {out}/checkpoint-{good[-1]}" in output
        assert_same_run(out, whole(1))
