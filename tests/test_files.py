"""One run at a time in a folder; what a dead process left there holds nothing."""

import errno
import signal
from unittest import mock

import pytest

from rmipo import files
from rmipo.errors import CheckpointError
from rmipo.files import LOCK_FILE, locked, read_lines
from tests.helpers.lock_holder import held


@pytest.fixture
def holder(tmp_path):
    with held(tmp_path / "out") as process:
        yield process


def test_a_second_run_is_refused_with_who_holds_the_folder(tmp_path, holder):
    with (
        pytest.raises(CheckpointError, match=f"OUTPUT: .*{tmp_path}/out"),
        locked(tmp_path / "out", "OUTPUT"),
    ):
        raise AssertionError("locked twice")
    assert (tmp_path / "out" / LOCK_FILE).exists()


def test_a_killed_run_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "out", wait=60):  # its child, as data loaders have them, lives a little longer
        pass


def test_where_the_file_system_has_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.FileLock, "acquire", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    with locked(tmp_path):
        assert str(tmp_path) in capsys.readouterr().out


def test_a_file_that_was_left_holds_nothing_and_goes(tmp_path):
    (tmp_path / LOCK_FILE).write_text("gone-node 17")
    with locked(tmp_path):
        (tmp_path / "run.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a')
    assert read_lines(tmp_path / "lines.jsonl") == [{"a": 1}, {"a": 2}] and read_lines(tmp_path / "none.jsonl") == []
    assert (tmp_path / "lines.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
