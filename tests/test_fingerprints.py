"""Two that differ in anything have two fingerprints; the same content has one, wherever it comes from."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from rmipo.errors import EvaluationError
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


def test_texts_settings_and_rows_by_their_content(tmp_path):
    assert text_fingerprint("abc") == text_fingerprint(b"abc") == "ba7816bf8f01cfea"  # SHA-256 of FIPS 180-2
    assert json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": [2], "a": 1}) != json_fingerprint({"a": 1})
    assert json_fingerprint({"a": Path("x")}) == json_fingerprint({"a": "x"})
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "row": 0}] * 2
    original = rows_fingerprint(Dataset.from_list(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert rows_fingerprint(Dataset.from_parquet(str(tmp_path / "rows.parquet"))) == original
    assert len(original) == 16
    assert rows_fingerprint(Dataset.from_list([dict(reversed(row.items())) for row in rows])) == original
    moved = [{**rows[0], "chosen_ids": [3, 4], "rejected_ids": [5]}, rows[1]]
    changed = [{**rows[0], "rejected_ids": [4, 6]}, rows[1]]
    others = (moved, changed, changed[::-1], rows[:1])
    assert len({original, *(rows_fingerprint(Dataset.from_list(other)) for other in others)}) == 5
    ids = [[number] for number in range(2001)]
    found = [rows_fingerprint(Dataset.from_dict({"ids": ids}))]
    for row in (0, 1000, 2000):
        ids[row] = [-1]
        found.append(rows_fingerprint(Dataset.from_dict({"ids": ids})))
    assert len({*found}) == 4


def test_code_by_its_modules_and_libraries(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(name)
    found = [code_fingerprint(tmp_path, [])]
    (tmp_path / "notes.txt").write_text("not code")
    (tmp_path / "__pycache__").mkdir()
    assert code_fingerprint(tmp_path, []) == found[0]
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"{name} = 1")
        found.append(code_fingerprint(tmp_path, []))
    found += [code_fingerprint(tmp_path, libraries) for libraries in (["torch"], ["torch", "numpy"])]
    assert len({*found}) == 5 and {len(each) for each in found} == {16}


def test_prompting_by_each_of_its_files(tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in names:
        found = []
        for folder in (tmp_path / name / "one", tmp_path / name / "other"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(str(folder))  # counts as the model
            found.append(prompting_fingerprint(folder))
            for text in ("a", "b"):
                (folder / name).write_text(text)
                found.append(prompting_fingerprint(folder))
        assert found[:3] == found[3:] and len({*found}) == 3


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


@pytest.fixture
def large(tmp_path):
    """A folder with a weight file of 6 MiB: three tensors of 2 MiB each."""
    torch.manual_seed(0)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    save_file({name: torch.rand(512, 1024) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_anything_changed_of_a_model_makes_another_one(large):
    tensors, found = load_file(large / "model.safetensors"), [model_fingerprint(large)]
    for tensor, place in zip(sorted(tensors), ((0, 0), (256, 512), (-1, -1)), strict=True):
        tensors[tensor][place] += 1e-3
        save_file(tensors, large / "model.safetensors")
        found.append(model_fingerprint(large))
    assert len({*found}) == 4
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
    shutil.copytree(large, large / "checkpoint-4")
    assert model_fingerprint(large) == model_fingerprint(large / "checkpoint-4") == trained_fingerprint(large)


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(large, monkeypatch):
    (large / "model-2.safetensors").write_bytes(b"more")
    expected, listed = model_fingerprint(large), Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: reversed(list(listed(folder, pattern))))
    assert model_fingerprint(large) == expected
