"""One run at a time in a folder; what a dead process left there holds nothing."""

import os
import signal
import socket

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


def test_a_lock_of_another_node_is_waited_for_until_its_lease_is_over(tmp_path, holder, monkeypatch):
    (tmp_path / "out" / LOCK_FILE).write_text("other-node 17")
    monkeypatch.setattr(lock, "LEASE", 2)
    waited = []
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: waited.append(seconds) or holder.kill() or holder.wait())
    with locked(tmp_path / "out"):
        assert waited == [1]


def test_a_file_that_its_holder_removes_as_it_is_opened_is_no_lock(tmp_path, monkeypatch):
    """The holder ends between our opening of its file and our locking it, and a third run begins."""
    lockf, calls = lock.fcntl.lockf, []

    def late(file, flags):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
            (tmp_path / LOCK_FILE).touch()
        calls.append(flags)
        lockf(file, flags)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{socket.gethostname()} {os.getpid()}"
    assert len(calls) == 2


def test_a_folder_in_which_nothing_was_written_is_not_left(tmp_path):
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
