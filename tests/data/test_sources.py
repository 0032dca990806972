"""Files, folders, hub ids and mixtures: which rows come, and what is said when they can't."""

import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from rmipo.data import sources
from rmipo.data.chat import DataError
from rmipo.data.dialogues import load_dialogues
from rmipo.data.pairs import load_pairs
from rmipo.data.sources import MissingSplitError, load_splits
from rmipo.recipe.schema import DataConfig
from tests.helpers.rows import config, pairs, questions, tokenize, write


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("train.jsonl.gz", "train"),
        ("train.json", "train"),
        ("train_prefs.jsonl", "train_prefs"),
        ("data/train-00000-of-00001.parquet", "train"),
    ],
)
def test_a_split_of_a_folder_is_found_by_name(tmp_path, name, split):
    write(tmp_path / name, pairs(0, 1, 2))
    write(tmp_path / "test.jsonl", pairs(7))
    for other in ("train.jsonl.bak", "old/train.jsonl", "my_train.jsonl"):
        write(tmp_path / other, pairs(8))
    data_config = config(tmp_path, dataset_train_split=split)
    assert questions(load_pairs(data_config, "train")) == [0, 1, 2]
    assert questions(load_pairs(data_config, "test")) == [7]


def test_shards_are_joined(tmp_path):
    for i in (2, 0, 3, 1):
        write(tmp_path / f"data/train-{i:05}-of-00004.parquet", pairs(2 * i, 2 * i + 1))
        write(tmp_path / f"test-{i}-of-4.jsonl", pairs(i))
    write(tmp_path / "train-old.jsonl", pairs(9))
    dataset = load_pairs(config(tmp_path), "train")
    assert questions(dataset) == dataset["row"][:] == list(range(8))
    assert questions(load_pairs(config(tmp_path), "test")) == [0, 1, 2, 3]
    for file in ("train.jsonl", "train.jsonl.gz"):  # rows twice
        write(tmp_path / "twice" / file, pairs(0, 1))
    with pytest.raises(DataError, match="split train"):
        load_pairs(config(tmp_path / "twice"), "train")


@pytest.mark.parametrize("names", [["00000-of-00002"], ["00000-of-00001", "00000-of-00001-abc"], ["0-of-2", "1-of-3"]])
def test_a_part_of_an_upload_or_more_than_one_is_refused(tmp_path, names):
    for name in names:
        write(tmp_path / f"train-{name}.jsonl", pairs(0))
    with pytest.raises(DataError, match="train-0"):
        load_pairs(config(tmp_path), "train")


def test_the_rows_are_those_of_the_file_whatever_its_time(tmp_path):
    for number in (1, 2):
        write(tmp_path / "train.jsonl", pairs(number))
        os.utime(tmp_path / "train.jsonl", (1, 1))  # as `cp -p` and `rsync -t` leave it
        assert questions(load_pairs(config(tmp_path, test_split_size=None), "train")) == [number]


def test_one_file_sets_rows_aside_that_are_drawn(tmp_path):
    path = write(tmp_path / "mine.jsonl", pairs(*range(55)))
    train, test = (load_pairs(config(path), split) for split in ("train", "test"))
    assert sorted(questions(train) + questions(test)) == list(range(55))
    assert questions(test) == test["row"][:] == shuffled(range(55), 0)[:3] != [52, 53, 54]
    assert questions(load_pairs(config(path, max_eval_samples=2), "test")) == questions(test)[:2]
    assert questions(load_pairs(config(path, mixture_seed=1), "test")) == questions(test)
    few = write(tmp_path / "few.jsonl", pairs(*range(10)))
    assert questions(load_pairs(config(few), "train")) == list(range(10))
    with pytest.raises(MissingSplitError, match=f"{few}: 10 rows are too few"):
        load_pairs(config(few), "test")


def test_what_save_to_disk_wrote(tmp_path):
    both = DatasetDict(train=Dataset.from_list(pairs(*range(5))), test=Dataset.from_list(pairs(7)))
    both.save_to_disk(tmp_path / "both")
    assert [questions(load_pairs(config(tmp_path / "both"), s)) for s in ("train", "test")] == [[*range(5)], [7]]
    Dataset.from_list(pairs(*range(60))).save_to_disk(tmp_path / "one", num_shards=3)
    train, test = (questions(load_pairs(config(tmp_path / "one"), split)) for split in ("train", "test"))
    assert sorted(train + test) == list(range(60)) and len(test) == 3


def test_test_split_size_divides_the_training_rows_alone(tmp_path):
    path = write(tmp_path / "mine.jsonl", pairs(*range(40)))
    train, test = (load_pairs(config(path, test_split_size=0.25), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 10)
    assert sorted(questions(train) + questions(test)) == list(range(40))
    assert questions(load_pairs(config(path, test_split_size=0.25, mixture_seed=5), "test")) != questions(test)
    write(tmp_path / "train.jsonl", pairs(*range(40)))
    write(tmp_path / "test.jsonl", pairs(900, 901, 902))
    assert questions(load_pairs(config(tmp_path, test_split_size=0.25), "test")) == questions(test)


def mixture(tmp_path, **values):
    """Two sources in different forms: 0..9 conversational, 100..119 full dialogues."""
    write(tmp_path / "a/train.jsonl", pairs(*range(10)))
    write(tmp_path / "a/test.jsonl", pairs(50))
    dialogues = [
        {"extra": 1, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in pairs(*range(100, 120))
    ]
    write(tmp_path / "b/sub/train_prefs.jsonl", dialogues)
    write(tmp_path / "b/sub/test_prefs.jsonl", dialogues[:2])
    second = {"path": str(tmp_path / "b"), "data_dir": "sub", "split": "train_prefs", "test_split": "test_prefs"}
    entries = [{"path": str(tmp_path / "a")}, second | {"columns": ["chosen", "rejected"]}]
    return entries, lambda split: load_pairs(DataConfig(datasets=entries, **values), split)


def test_a_mixture_is_concatenated_or_taken_in_fractions(tmp_path):
    _, load_split = mixture(tmp_path)
    train = load_split("train")
    assert questions(train) == [*range(10), *range(100, 120)]
    assert train["row"][:] == list(range(30))
    assert questions(load_split("test")) == [50, 100, 101]
    entries, load_split = mixture(tmp_path)
    entries[0]["fraction"], entries[1]["fraction"] = 3, 2  # 10 rows are three fifths of 16.7
    assert questions(load_split("train")) == [*range(10), *range(100, 107)]
    assert questions(load_split("test")) == [50, 100, 101]
    entries, load_split = mixture(tmp_path)
    entries[0] |= {"weight": 0.5, "fraction": 1}
    entries[1] |= {"weight": 0.25, "fraction": 1}
    assert sorted(number < 100 for number in questions(load_split("train"))) == [False] * 5 + [True] * 5


def test_weights_are_shares_of_a_source_drawn_with_a_seed(tmp_path):
    entries, load_split = mixture(tmp_path, mixture_seed=3)
    entries[0]["weight"], entries[1]["weight"] = 1.0, 0.28
    train = load_split("train")
    numbers = questions(train)
    # The first 5.6 of the shuffled rows, then all shuffled: rows are those of earlier runs with the seed.
    sources = [*shuffled(range(10), 3), *shuffled(range(100, 120), 3)[:5]]
    assert numbers == shuffled(sources, 3)
    assert max(numbers) > 104
    assert questions(load_split("train")) == numbers
    assert train["row"][:] == [n if n < 10 else n - 90 for n in numbers]
    assert len(load_split("test")) == 3  # test rows are never drawn


def shuffled(numbers, seed):
    return [numbers[i] for i in np.random.default_rng(seed).permutation(len(numbers))]


def test_sample_limits_are_of_the_shuffled_rows(tmp_path):
    entries, load_split = mixture(tmp_path, max_train_samples=7)
    assert questions(load_split("train")) == [*range(7)]
    entries[1]["weight"] = 0.5
    sources = [*range(10), *shuffled(range(100, 120), 0)[:10]]
    assert questions(load_split("train")) == shuffled(sources, 0)[:7]
    limits = {"max_train_samples": 7, "max_eval_samples": 3}
    whole, limited = (DataConfig(datasets=entries, test_split_size=6, **values) for values in ({}, limits))
    assert questions(load_pairs(limited, "test")) == questions(load_pairs(whole, "test"))[:3]


@pytest.mark.parametrize("share", ["weight", "fraction"])
def test_the_two_parts_of_a_mixture_are_of_the_rows_that_were_drawn(tmp_path, share):
    entries, load_split = mixture(tmp_path, test_split_size=4)
    entries[0][share], entries[1][share] = (0.5, 0.25) if share == "weight" else (1, 1)
    train, test = (questions(load_split(split)) for split in ("train", "test"))
    count = 10 if share == "weight" else 20
    assert len(test) == 4 and len(train) == count - 4 and len({*train, *test}) == count
    entries, load_split = mixture(tmp_path, test_split_size=2)  # drawn alike: the same rows, divided in another way
    entries[0][share], entries[1][share] = (0.5, 0.25) if share == "weight" else (1, 1)
    assert {*questions(load_split("train")), *questions(load_split("test"))} == {*train, *test}


def test_a_configuration_and_revision_reach_the_hub(monkeypatch):
    """The arguments of `load_dataset` are looked at: there is no hub in the tests."""
    asked = []
    monkeypatch.setattr(sources, "load_dataset", lambda path, **arguments: asked.append((path, arguments)) or 1 / 0)
    entry = {"path": "a/b", "name": "x", "data_dir": "sub", "data_files": "c.jsonl", "revision": "v3"}
    for data_config, split in (
        (config("a/b"), "test"),
        (config("a/b", dataset_config="tiny", dataset_revision="v2", dataset_train_split="train_x"), "train"),
        (DataConfig(datasets=[entry | {"test_split": "dev"}]), "test"),
        (DataConfig(datasets=[{"path": "a/b", "split": "train_y"}]), "test"),  # not of the training rows
    ):
        with pytest.raises(ZeroDivisionError):
            load_pairs(data_config, split)
    assert asked == [
        ("a/b", {"split": "test"}),
        ("a/b", {"split": "train_x", "name": "tiny", "revision": "v2"}),
        ("a/b", {"split": "dev", "name": "x", "data_dir": "sub", "data_files": "c.jsonl", "revision": "v3"}),
        ("a/b", {"split": "test"}),
    ]


def test_a_split_or_configuration_that_a_dataset_of_the_hub_has_not(tmp_path, monkeypatch):
    """`load_dataset` says the same of a folder."""
    write(tmp_path / "train.jsonl", pairs(0, 1))
    loaded = sources.load_dataset
    monkeypatch.setattr(sources, "load_dataset", lambda path, **arguments: loaded(str(tmp_path), **arguments))
    assert len(load_pairs(config("some/pairs"), "train")) == 2
    for missing in ({"dataset_train_split": "dev"}, {"dataset_config": "tiny"}):
        with pytest.raises(MissingSplitError, match=f"some/pairs.*{next(iter(missing.values()))}"):
            load_pairs(config("some/pairs", **missing), "train")


def test_what_only_the_hub_has_is_refused_for_local_data(tmp_path):
    path = write(tmp_path / "train.jsonl", pairs(*range(12)))
    with pytest.raises(DataError, match=f"{path} is local, .*validation"):  # one file has no other split
        load_pairs(config(path, dataset_train_split="validation"), "train")
    for place in (tmp_path, path):
        with pytest.raises(DataError, match=f"^{place} is local, and name, revision"):
            load_pairs(config(place, dataset_config="tiny", dataset_revision="v2"), "train")
        with pytest.raises(DataError, match=f"^{place} is local, and data_files"):
            load_pairs(DataConfig(datasets=[{"path": str(place), "data_files": "a.jsonl"}]), "train")


def test_what_is_no_data_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    notes = write(tmp_path / "notes.jsonl.txt", pairs(0))
    for path in ("/nothing", "nothing.jsonl", "./nothing", "data/of/mine", tmp_path / "empty.jsonl", notes):
        with pytest.raises(DataError, match=str(path)):
            load_pairs(config(path), "train")
    with pytest.raises(DataError, match=r"^some-owner/some-pairs ") as error:
        load_pairs(config("some-owner/some-pairs", dataset_revision="main"), "train")
    assert not isinstance(error.value, MissingSplitError)  # it may have the split
    write(tmp_path / "train.jsonl", [{"question": "a", "chosen": "b", "reject": "c"}])
    for load, column in ((load_pairs, "rejected"), (load_dialogues, "completion")):
        with pytest.raises(DataError, match=f"{tmp_path}: row 0: there is no {column}, found the columns question"):
            load(config(tmp_path), "train")


def test_rows_are_counted_through_all_sources(tmp_path):
    for number, count in enumerate((2, 3, 4)):
        write(tmp_path / f"{number}/train.jsonl", pairs(*range(count)))
    entries = [{"path": str(tmp_path / str(number))} for number in range(3)]
    assert load_pairs(DataConfig(datasets=entries), "train")["row"][:] == list(range(9))
    write(tmp_path / "train.jsonl", [{"row": "a", **row} for row in pairs(3, 4)])
    assert load_pairs(config(tmp_path), "train")["row"][:] == [0, 1]


def test_rows_of_other_code_are_prepared_again(monkeypatch, tmp_path):
    write(tmp_path / "train.jsonl", pairs(0, 1))

    def fingerprints():
        loaded, tokenized = load_pairs(config(tmp_path), "train"), tokenize(pairs(0, 1))[0]
        written = Path(loaded.cache_files[0]["filename"]).stat().st_mtime_ns
        return loaded._fingerprint, tokenized._fingerprint, written

    before = fingerprints()
    assert fingerprints() == before
    for module in ("formats", "pairs"):
        monkeypatch.setattr(f"rmipo.data.{module}.code_digest", lambda: "after a git pull")
    assert not {*fingerprints()} & {*before}


def test_a_test_split_is_loaded_or_its_absence_said_or_refused(tmp_path, caplog):
    write(tmp_path / "train.jsonl", pairs(0, 1))
    caplog.set_level("WARNING")
    assert load_splits(load_pairs, config(tmp_path), evaluating=False).keys() == {"train"}
    assert str(tmp_path) in caplog.text
    with pytest.raises(DataError, match="eval_strategy: no"):
        load_splits(load_pairs, config(tmp_path), evaluating=True)
    write(tmp_path / "test.jsonl", pairs(2))
    splits = load_splits(load_pairs, config(tmp_path), evaluating=False)
    assert {split: questions(rows) for split, rows in splits.items()} == {"train": [0, 1], "test": [2]}
    write(tmp_path / "test.jsonl", [{"question": "a"}])
    with pytest.raises(DataError, match="there is no"):
        load_splits(load_pairs, config(tmp_path), evaluating=False)
