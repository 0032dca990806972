"""Two that differ in anything have two fingerprints; the same content has one, wherever it comes from."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from rmipo.fingerprints import json_fingerprint, model_fingerprint, rows_fingerprint


def test_rows_by_their_content(tmp_path):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "row": 0}] * 2
    original = rows_fingerprint(Dataset.from_list(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert rows_fingerprint(Dataset.from_parquet(str(tmp_path / "rows.parquet"))) == original
    assert len(original) == 16
    moved = [{**rows[0], "chosen_ids": [3, 4], "rejected_ids": [5]}, rows[1]]
    changed = [{**rows[0], "rejected_ids": [4, 6]}, rows[1]]
    others = (moved, changed, changed[::-1], rows[:1])
    assert len({original, *(rows_fingerprint(Dataset.from_list(other)) for other in others)}) == 5


@pytest.mark.parametrize("row", [0, 1000, 2000])
def test_every_one_of_many_rows_counts(row):
    ids = [[number] for number in range(2001)]
    before = rows_fingerprint(Dataset.from_dict({"ids": ids}))
    ids[row] = [-1]
    assert rows_fingerprint(Dataset.from_dict({"ids": ids})) != before


def test_settings_whatever_the_order_of_their_keys():
    assert json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": [2], "a": 1}) != json_fingerprint({"a": 1})


@pytest.fixture
def large(tmp_path):
    """A folder with a weight file of 6 MiB: three tensors of 2 MiB each."""
    torch.manual_seed(0)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    save_file({name: torch.rand(512, 1024) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("position", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_one_changed_number_anywhere_is_another_model(large, position):
    before = model_fingerprint(large)
    tensors = load_file(large / "model.safetensors")
    names = sorted(tensors)
    place = round(position * (len(names) * 512 * 1024 - 1))
    tensors[names[place // (512 * 1024)]].view(-1)[place % (512 * 1024)] += 1e-3
    save_file(tensors, large / "model.safetensors")
    assert model_fingerprint(large) != before


def test_a_file_moved_or_another_configuration_is_another_model(large):
    found = {model_fingerprint(large)}
    (large / "config.json").write_text('{"rope_theta": 1}')
    found.add(model_fingerprint(large))
    (large / "model.safetensors").rename(large / "model-00001-of-00001.safetensors")
    found.add(model_fingerprint(large))
    (large / "tokenizer.json").write_text("not weights")
    found.add(model_fingerprint(large))
    assert len(found) == 3
    for weights in (b"one", b"two"):  # allow_pickled_weights
        (large / "pytorch_model.bin").write_bytes(weights)
        found.add(model_fingerprint(large))
    assert len(found) == 5


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(large, monkeypatch):
    (large / "model-2.safetensors").write_bytes(b"more")
    expected, listed = model_fingerprint(large), Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: reversed(list(listed(folder, pattern))))
    assert model_fingerprint(large) == expected
