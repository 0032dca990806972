"""One run at a time in a folder; what a dead process left there holds nothing."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rmipo.errors import CheckpointError
from rmipo.run import lock
from rmipo.run.lock import LOCK_FILE, locked
from tests.helpers.lock_holder import held


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "out"`."""
    with held(tmp_path / "out") as process:
        yield process


def test_a_second_run_is_refused_with_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(CheckpointError, match=rf"another run is active in .*out \(process {holder.pid} on "):  # noqa: SIM117
        with locked(tmp_path / "out"):
            raise AssertionError("locked twice")
    assert (tmp_path / "out" / LOCK_FILE).exists()


def test_a_killed_run_holds_nothing_though_its_children_live(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK_FILE).read_text() == f"{socket.gethostname()} {os.getpid()}"


def test_what_a_dead_node_left_holds_nothing(tmp_path):
    (tmp_path / LOCK_FILE).write_text("gone-node 17")
    with locked(tmp_path):
        assert "gone-node" not in (tmp_path / LOCK_FILE).read_text()
    assert not (tmp_path / LOCK_FILE).exists()


class Clock:
    """In place of the module `time`: sleeping takes no time, and `then` is called each time."""

    def __init__(self, then=lambda: None):
        self.seconds, self.then = 1000, then

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        assert self.seconds < 2000
        self.then()


def test_a_lock_of_another_node_is_waited_for_until_it_is_free(tmp_path, holder, monkeypatch):
    (tmp_path / "out" / LOCK_FILE).write_text("other-node 17")
    clock = Clock(then=lambda: holder.kill() or holder.wait())
    monkeypatch.setattr(lock, "time", clock)
    with locked(tmp_path / "out"):
        assert clock.seconds == 1001


@pytest.mark.parametrize(
    "written, waited",
    [("other-node 17", 120), (f"{socket.gethostname()} 17", 0), ("", 0)],
    ids=["other", "own", "none"],
)
def test_only_a_lease_of_another_node_is_waited_for(tmp_path, holder, monkeypatch, written, waited):
    """NFSv4 frees the locks of a dead node after 90 seconds."""
    (tmp_path / "out" / LOCK_FILE).write_text(written)
    monkeypatch.setattr(lock, "time", clock := Clock())
    host, _, process = written.partition(" ")
    with pytest.raises(CheckpointError) as error, locked(tmp_path / "out", "OUTPUT"):
        raise AssertionError("locked twice")
    assert clock.seconds == 1000 + waited
    assert str(error.value) == (
        f"OUTPUT: another run is active in {tmp_path}/out (process {process} on {host}). Wait for it, end it, or name "
        "another OUTPUT"
    )
    assert (tmp_path / "out" / LOCK_FILE).read_text() == written


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_the_file_system_has_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(file, flags):
        raise OSError(number, "no locks")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with locked(tmp_path / "new" / "out"):
        assert capsys.readouterr().out.startswith(f"{tmp_path}/new/out can't be locked on this file system: ")


def test_the_file_is_removed_while_the_lock_is_held(tmp_path, monkeypatch):
    """Else a second run could lock it in between, and a third one a new file of that name."""
    lock_it = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    codes, unlink = [], Path.unlink

    def watched(path, **options):
        codes.append(subprocess.run([sys.executable, "-c", lock_it, path], capture_output=True).returncode)
        unlink(path, **options)

    with locked(tmp_path):
        monkeypatch.setattr(Path, "unlink", watched)
    assert codes == [1]


def test_a_run_whose_lock_file_was_removed_ends_well(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK_FILE).unlink()


def test_a_file_that_its_holder_removes_as_it_is_opened_is_no_lock(tmp_path, monkeypatch):
    """The holder ends between our opening of its file and our locking it, and once a third run begins."""
    lockf, calls = lock.fcntl.lockf, []

    def late(file, flags):
        if len(calls) < 2:
            (tmp_path / LOCK_FILE).unlink()
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).touch()
        calls.append(flags)
        lockf(file, flags)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{socket.gethostname()} {os.getpid()}"
    assert len(calls) == 3


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path):
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
