"""Prepared rows are those of the code and libraries that are there now."""

import pytest

from rmipo.data.chat import DataError
from rmipo.data.convert import code_digest, load_splits
from rmipo.data.pairs import load_pairs
from tests.helpers.rows import config, pairs, tokenize, write


def digests_with(monkeypatch, target, value):
    code_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(target, value)
        digest = code_digest()
    code_digest.cache_clear()
    return digest


def test_the_digest_is_of_code_and_versions(monkeypatch, tmp_path):
    now = code_digest()
    (tmp_path / "chat.py").write_text("")
    versions = "importlib.metadata.version"
    assert digests_with(monkeypatch, versions, lambda name: "0") != now
    assert digests_with(monkeypatch, "rmipo.data.convert.__file__", str(tmp_path / "convert.py")) != now
    one = digests_with(monkeypatch, versions, lambda name: "2" if name == "jinja2" else "1")
    assert one != digests_with(monkeypatch, versions, lambda name: "1")
    assert code_digest() == now


def test_rows_of_other_code_are_prepared_again(monkeypatch, tmp_path):
    """datasets names its cache after this fingerprint."""
    write(tmp_path / "train.jsonl", pairs(0, 1))

    def fingerprints():
        loaded, tokenized = load_pairs(config(tmp_path), "train"), tokenize(pairs(0, 1))[0]
        return loaded._fingerprint, tokenized._fingerprint

    before = fingerprints()
    assert fingerprints() == before
    for module in ("convert", "pairs"):
        monkeypatch.setattr(f"rmipo.data.{module}.code_digest", lambda: "after a git pull")
    assert not {*fingerprints()} & {*before}


def test_a_missing_test_split_is_said_or_refused(tmp_path, caplog):
    write(tmp_path / "train.jsonl", pairs(0, 1))
    caplog.set_level("WARNING")
    assert load_splits(load_pairs, config(tmp_path), evaluating=False).keys() == {"train"}
    assert "no evaluation, since there is no test split" in caplog.text
    with pytest.raises(DataError, match="Or train without evaluation: eval_strategy: no"):
        load_splits(load_pairs, config(tmp_path), evaluating=True)
