"""One run at a time in a folder; what a dead process left there holds nothing."""

import errno
import signal
from unittest import mock

import pytest

from rmipo import files
from rmipo.errors import CheckpointError
from rmipo.files import LOCK_FILE, locked, read_lines
from tests.helpers.lock_holder import held


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    out = tmp_path / "out"
    with held(out) as holder:
        with pytest.raises(CheckpointError, match=f"OUTPUT: .*{out}"), locked(out, "OUTPUT"):
            raise AssertionError("locked twice")
        assert (out / LOCK_FILE).exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(out, wait=60):  # its child, as data loaders have them, lives a little longer
            pass
    assert not (out / LOCK_FILE).exists()


def test_where_the_file_system_has_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.FileLock, "acquire", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    with locked(tmp_path):
        assert str(tmp_path) in capsys.readouterr().out


def test_a_line_that_a_kill_cut_short_is_removed(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a')
    assert read_lines(tmp_path / "lines.jsonl") == [{"a": 1}, {"a": 2}] and read_lines(tmp_path / "none.jsonl") == []
    assert (tmp_path / "lines.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
