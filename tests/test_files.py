"""One run at a time in a folder; what a dead process left there holds nothing."""

import errno
import signal
from unittest import mock

import pytest

from rmipo import files
from rmipo.errors import CheckpointError
from rmipo.files import LOCK_FILE, locked
from tests.helpers.lock_holder import held


@pytest.fixture
def holder(tmp_path):
    with held(tmp_path / "out") as process:
        yield process


def test_a_second_run_is_refused_with_who_holds_the_folder(tmp_path, holder):
    with (
        pytest.raises(CheckpointError, match=rf"OUTPUT: .*{tmp_path}/out .*{holder.pid}"),
        locked(tmp_path / "out", "OUTPUT"),
    ):
        raise AssertionError("locked twice")
    assert (tmp_path / "out" / LOCK_FILE).exists()


def test_a_killed_run_holds_nothing(tmp_path, holder, monkeypatch):
    """Its child, as data loaders have them, may live a little longer: a requeued job waits for it as for a dead node."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out"):
        pass


def test_only_a_job_waits_for_the_lease_of_a_dead_node(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(files, "FileLock", lambda path, timeout, **options: waits.append(timeout) or mock.Mock())
    for job in ("", "7"):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with locked(tmp_path):
            pass
    with locked(tmp_path, wait=-1):  # what another process makes for this one too is waited for as long as it takes
        pass
    assert waits == [1, 120, -1]


def test_where_the_file_system_has_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.FileLock, "acquire", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    with locked(tmp_path):
        assert str(tmp_path) in capsys.readouterr().out


def test_what_was_left_holds_nothing_and_an_empty_folder_is_not_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).write_text("gone-node 17")
    with locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
    with locked(tmp_path / "out"):
        (tmp_path / "out/run.json").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
