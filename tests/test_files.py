"""One run at a time in a folder; fingerprints: two that differ in anything have two, the same content has one."""

import errno
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from rmipo import files
from rmipo.errors import CheckpointError, EvaluationError
from rmipo.files import LOCK_FILE, locked, read_lines
from rmipo.fingerprints import (
    code_fingerprint,
    has_weights,
    json_fingerprint,
    model_fingerprint,
    prompting_fingerprint,
    rows_fingerprint,
    text_fingerprint,
    trained_fingerprint,
)
from tests.helpers.programs import held


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


def test_texts_settings_and_rows_by_their_content(tmp_path):
    assert text_fingerprint("abc") == text_fingerprint(b"abc") == "ba7816bf8f01cfea"  # SHA-256 of FIPS 180-2
    assert json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": [2], "a": 1}) != json_fingerprint({"a": 1})
    assert json_fingerprint({"a": Path("x")}) == json_fingerprint({"a": "x"})
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "row": 0}] * 2
    original = rows_fingerprint(Dataset.from_list(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert rows_fingerprint(Dataset.from_parquet(str(tmp_path / "rows.parquet"))) == original
    assert rows_fingerprint(Dataset.from_list([dict(reversed(row.items())) for row in rows])) == original
    moved = [{**rows[0], "chosen_ids": [3, 4], "rejected_ids": [5]}, rows[1]]
    changed = [{**rows[0], "rejected_ids": [4, 6]}, rows[1]]
    others = (moved, changed, changed[::-1], rows[:1])
    assert len({original, *(rows_fingerprint(Dataset.from_list(other)) for other in others)}) == 5
    ids = [[number] for number in range(2001)]
    whole = rows_fingerprint(Dataset.from_dict({"ids": ids}))
    assert rows_fingerprint(Dataset.from_dict({"ids": [*ids[:-1], [-1]]})) != whole


def test_a_model_of_the_hub_by_its_name_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = ["a" * 40, "b" * 40]
    for name in ("model", "other"):
        folder = tmp_path / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        for commit, revision in zip(commits, ("main", "v2"), strict=True):
            (folder / "snapshots" / commit).mkdir(parents=True)
            (folder / "snapshots" / commit / "config.json").write_text("{}")
            (folder / "refs" / revision).write_text(commit)
    main, tagged, other = (model_fingerprint(*model) for model in (["org/model"], ["org/model", "v2"], ["org/other"]))
    assert len({main, tagged, other}) == 3
    assert model_fingerprint("org/model", commits[0]) == main
    (tmp_path / "models--org--model/refs/main").write_text(commits[1])
    assert model_fingerprint("org/model") == tagged


def test_only_files_that_are_there_are_weights(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"")
    assert not has_weights(tmp_path)
    with pytest.raises(EvaluationError, match=rf"{tmp_path} holds no \*\.safetensors"):
        trained_fingerprint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert has_weights(tmp_path)


def test_code_by_its_modules_and_libraries(tmp_path):
    found = []
    for text in ("a", "b"):
        (tmp_path / "module.py").write_text(text)
        (tmp_path / f"{text}.txt").write_text("not code")
        found += [code_fingerprint(tmp_path, libraries) for libraries in ([], ["torch"], ["torch", "numpy"], [])]
    assert len({*found}) == 6 and found[0] == found[3] and found[4] == found[7]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_prompting_by_each_of_its_files(tmp_path, name):
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        (folder / "config.json").write_text(str(folder))  # counts as the model
        for text in ("a", "b"):
            (folder / name).write_text(text)
            found.append(prompting_fingerprint(folder))
    assert found[:2] == found[2:] and found[0] != found[1]


def test_anything_changed_of_a_model_makes_another_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = {name: torch.rand(512, 1024) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    found = []

    def changed():
        found.append(model_fingerprint(tmp_path))

    (tmp_path / "config.json").write_text("{}")
    for place in ((0, 0), (256, 512), (-1, -1)):
        tensors["model.norm.weight"][place] += 1e-3
        save_file(tensors, tmp_path / "model.safetensors")
        changed()
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    changed()
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    changed()
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")  # allow_pickled_weights
    changed()
    assert len({*found}) == 6
    (tmp_path / "tokenizer.json").write_text("not weights")
    shutil.copytree(tmp_path, tmp_path / "checkpoint-4")
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: reversed(list(listed(folder, pattern))))
    same = model_fingerprint(tmp_path), model_fingerprint(tmp_path / "checkpoint-4"), trained_fingerprint(tmp_path)
    assert {*same} == {found[-1]}
    (tmp_path / "pytorch_model.bin").write_bytes(b"another")
    assert trained_fingerprint(tmp_path) != found[-1]
