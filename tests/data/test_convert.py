"""Prepared rows are those of the code and libraries that are there now; both splits; rows that can't be read."""

from pathlib import Path

import pytest

from rmipo.data.chat import DataError
from rmipo.data.convert import code_digest, load_splits
from rmipo.data.pairs import load_pairs
from rmipo.recipe.schema import DataConfig
from tests.helpers.rows import config, pairs, questions, tokenize, write


def digests_with(monkeypatch, target, value):
    code_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(target, value)
        digest = code_digest()
    code_digest.cache_clear()
    return digest


def test_the_digest_is_of_code_and_versions(monkeypatch, tmp_path):
    now = code_digest()
    found = [now]
    for text in ("", "x = 1"):
        (tmp_path / "chat.py").write_text(text)
        found.append(digests_with(monkeypatch, "rmipo.data.convert.__file__", str(tmp_path / "convert.py")))
    for library in ("", "transformers", "tokenizers", "jinja2", "trl", "datasets"):
        versions = {library: "2"}
        found.append(digests_with(monkeypatch, "importlib.metadata.version", lambda name, v=versions: v.get(name, "1")))
    assert len({*found}) == 9
    assert code_digest() == now


def test_rows_of_other_code_are_prepared_again(monkeypatch, tmp_path):
    """datasets names its cache after this fingerprint."""
    write(tmp_path / "train.jsonl", pairs(0, 1))

    def fingerprints():
        loaded, tokenized = load_pairs(config(tmp_path), "train"), tokenize(pairs(0, 1))[0]
        written = Path(loaded.cache_files[0]["filename"]).stat().st_mtime_ns
        return loaded._fingerprint, tokenized._fingerprint, written

    before = fingerprints()
    assert fingerprints() == before
    for module in ("convert", "pairs"):
        monkeypatch.setattr(f"rmipo.data.{module}.code_digest", lambda: "after a git pull")
    assert not {*fingerprints()} & {*before}


def test_a_missing_test_split_is_said_or_refused(tmp_path, caplog):
    write(tmp_path / "train.jsonl", pairs(0, 1))
    caplog.set_level("WARNING")
    assert load_splits(load_pairs, config(tmp_path), evaluating=False).keys() == {"train"}
    assert f"no evaluation, since there is no test split: {tmp_path}: no file of the test split" in caplog.text
    with pytest.raises(DataError, match=r"no file of the test .* Or train without evaluation: eval_strategy: no"):
        load_splits(load_pairs, config(tmp_path), evaluating=True)


def test_a_test_split_that_is_there_is_loaded_or_its_mistake_said(tmp_path):
    write(tmp_path / "train.jsonl", pairs(0, 1))
    write(tmp_path / "test.jsonl", pairs(2))
    splits = load_splits(load_pairs, config(tmp_path), evaluating=False)
    assert {split: questions(rows) for split, rows in splits.items()} == {"train": [0, 1], "test": [2]}
    write(tmp_path / "test.jsonl", [{"question": "a"}])
    with pytest.raises(DataError, match="missing columns"):
        load_splits(load_pairs, config(tmp_path), evaluating=False)


def test_rows_that_cannot_be_read_are_named_by_source_reason_and_number(tmp_path):
    first, second = (write(tmp_path / name / "train.jsonl", pairs(*range(6))).parent for name in "ab")
    bad = [pairs(0)[0] | changes for changes in ({"tools": ["f"]}, {"prompt": ["q"]}, {"tools": ["g"]})]
    write(second / "train.jsonl", [*pairs(0), *bad])
    with pytest.raises(DataError) as error:
        load_pairs(DataConfig(datasets=[{"path": str(first)}, {"path": str(second)}]), "train")
    title, *lines = str(error.value).split("\n")
    assert title.startswith(f"train: {second}: rows that can't be read")
    assert lines[0].startswith("- `tools` is part of the prompt") and lines[0].endswith(": rows 7, 9")
    assert lines[1] == "- `prompt` holds str, expected messages with role and content: row 8"
