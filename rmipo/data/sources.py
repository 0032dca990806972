"""Where rows come from: hub datasets, local folders and files, and mixtures of them."""

import functools
import glob
import gzip
import json
import logging
import os
import re
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from rmipo.data.chat import DataError
from rmipo.fingerprints import file_digest, text_fingerprint
from rmipo.recipe.schema import DataConfig

logger = logging.getLogger(__name__)

BUILDERS = dict.fromkeys((".jsonl", ".json", ".jsonl.gz", ".json.gz"), "json")
BUILDERS |= {".parquet": "parquet", ".arrow": "arrow"}
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")  # at the end of a file's name without its suffix
SAVED = "state.json"  # in a folder that `Dataset.save_to_disk` wrote; a `DatasetDict` has one for each split
HELD_OUT = 0.05  # share of local data without splits that becomes its test split
SUBSET_KEYS = ("name", "data_dir", "data_files", "revision")


@functools.cache
def warn_once(text: str) -> None:
    """A warning that several processes, or both splits, would give."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)


class MissingSplitError(DataError):
    """The data has no such split; everything else about it may be right."""


def load_sources(data_config: DataConfig, split: str) -> list[tuple[str, Dataset]]:
    """The rows of every source for `split`, "train" or "test": its name for messages, and a dataset.

    A dataset has the columns as they are published, and `row`, which counts through the sources one after the other. With
    `test_split_size` both splits are drawn from the training rows: see `mix`.
    """
    # `mix` divides the mixture into both splits, so both start from the same rows.
    source_split = "train" if data_config.test_split_size else split
    sources, first_row = [], 0
    for entry in mixture_entries(data_config):
        dataset, divided = load_source(entry, source_split, data_config)
        # Numbered before anything is dropped or shuffled: messages name rows by their place in the file.
        dataset = dataset.remove_columns([name for name in dataset.column_names if name == "row"])
        dataset = dataset.add_column("row", list(range(first_row, first_row + len(dataset))))
        first_row += len(dataset)
        if data_config.test_split_size and divided and split == "test":
            warn_once(
                f"{entry['path']}: test_split_size holds out rows of its training split; a test split is not read"
            )
        if not (divided or data_config.test_split_size):
            dataset = hold_out(dataset, split, entry["path"])
        if columns := entry.get("columns"):  # TRL's key: sources of a mixture have to have the same ones
            try:
                dataset = dataset.select_columns([*columns, "row"])
            except ValueError as error:
                raise DataError(f"{entry['path']}: columns: {error}") from error
        sources.append((entry["path"], dataset))
    return sources


def mix(datasets: list[Dataset], data_config: DataConfig, split: str) -> Dataset:
    """One dataset of those of all sources, which have the same columns.

    A `weight` is the share of its source that is taken, drawn with `mixture_seed`; a `fraction` is TRL's. The rows are in
    the order of the sources, or shuffled where weights are given. `test_split_size` and `max_*_samples` come last.
    """
    seed, size = data_config.mixture_seed, data_config.test_split_size
    entries = mixture_entries(data_config)
    # Shares are of training data; a test split is measured whole, so that its metrics do not change with the mixture.
    if split == "train" or size:
        datasets = take_shares(datasets, entries, seed)
    mixed = concatenate_datasets(datasets)
    # In the handbook's recipes, where weights come from, the mixture is shuffled too; TRL's fractions leave it in order.
    if any(entry.get("weight") is not None for entry in entries):
        mixed = mixed.shuffle(seed=seed)
    if size:
        try:
            mixed = mixed.train_test_split(test_size=size, seed=seed)[split]
        except ValueError as error:  # one part would be empty
            raise DataError(f"test_split_size is {size}: {len(mixed)} rows can't be divided so: {error}") from error
    key = "max_train_samples" if split == "train" else "max_eval_samples"
    limit = getattr(data_config, key)
    if limit is not None and len(entries) > 1 and limit < len(mixed):
        warn_once(f"{key}: {limit} rows of the mixture are taken, its first datasets first unless weights shuffle it")
    return mixed if limit is None else mixed.select(range(min(limit, len(mixed))))


def mixture_entries(data_config: DataConfig) -> list[dict]:
    """The sources of a `DataConfig` as mixture entries; a single dataset is a mixture of one."""
    if data_config.datasets:
        return data_config.datasets
    if data_config.dataset_name:
        subset = {"name": data_config.dataset_config, "revision": data_config.dataset_revision}
        return [{"path": data_config.dataset_name, **subset}]
    raise DataError("The recipe names no data: set `dataset_name` (a hub id, folder or file) or `datasets`.")


def take_shares(datasets: list[Dataset], entries: list[dict], seed: int) -> list[Dataset]:
    """The part of each source that its `weight` and `fraction` ask for."""
    taken = list(datasets)
    for number, entry in enumerate(entries):
        if weight := entry.get("weight"):
            rows = int(len(taken[number]) * weight)  # rounded down, as in the handbook
            taken[number] = taken[number].shuffle(seed=seed).select(range(rows))
    if entries[0].get("fraction"):  # of all sources, or of none
        # TRL's meaning: shares of the mixture, which is as large as the source that is scarcest for its share allows.
        total = min(len(rows) / entry["fraction"] for rows, entry in zip(taken, entries, strict=True))
        sizes = [round(entry["fraction"] * total) for entry in entries]
        taken = [rows.select(range(size)) for rows, size in zip(taken, sizes, strict=True)]
    for entry, whole, rows in zip(entries, datasets, taken, strict=True):
        if not len(rows):
            raise DataError(f"{entry['path']}: weight or fraction takes none of its {len(whole)} rows. Raise it")
        if len(rows) < len(whole):
            warn_once(f"{entry['path']}: {len(rows)} of its {len(whole)} rows are taken, by weight or fraction")
    return taken


def load_source(entry: dict, split: str, data_config: DataConfig) -> tuple[Dataset, bool]:
    """Rows of one source with the columns they were published with, and whether the source is divided into splits."""
    if split == "train":
        name = entry.get("split") or data_config.dataset_train_split
    else:
        name = entry.get("test_split") or data_config.dataset_test_split
    source, path = entry["path"], Path(entry["path"])
    if path.exists():
        # What only datasets of the hub have would have no effect, in silence.
        if unread := [key for key in ("name", "revision", "data_files") if entry.get(key)]:
            raise DataError(f"{source} is local: {', '.join(unread)} would have no effect. Remove them")
        if "[" in name or (path.is_file() and name not in ("train", "test")):
            raise DataError(f"{source} is local: there is no split {name!r} of it. Set max_train_samples for a part")
    folder = path / (entry.get("data_dir") or "")
    if path.is_file():
        return load_files([path], source), False
    if (folder / SAVED).is_file():
        return load_files(saved_files(folder), source), False
    if path.is_dir():
        return load_files(find_split(folder, name, split), source), True
    # A hub id has one slash and no suffix. What can't be one is a path with a mistake, which the hub would blame on a login.
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or suffix(path):
        raise DataError(f"{source}: no such file or folder. Paths are relative to the working directory.")
    return load_hub(entry, name), True


def hold_out(dataset: Dataset, split: str, source: str) -> Dataset:
    """The part of data without splits that is `split`; which rows are held out is drawn, as the data may be sorted.

    They are the same in every program: no seed of a recipe moves rows between an SFT stage's training and a later test.
    """
    test_rows = round(len(dataset) * HELD_OUT)
    if test_rows:
        parts = dataset.train_test_split(test_size=test_rows, seed=0)
        if split == "test":
            warn_once(f"{source}: it has no splits, so {test_rows} of its {len(dataset)} rows are the test split")
        return parts[split]
    if split == "test":
        raise MissingSplitError(f"{source}: {len(dataset)} rows are too few for a test split. Set `test_split_size`.")
    return dataset


def find_split(folder: Path, name: str, split: str) -> list[Path]:
    """Files of split `name` in a folder or its data/: `train_prefs.jsonl.gz`, `data/train-00000-of-00002.parquet`.

    Shards of older uploads have a hash too: `data/train-00000-of-00002-9564e8b05b4757ab.parquet`. A folder that
    `DatasetDict.save_to_disk` wrote has a folder for each split.

    Where no file has the recipe's name of a split, the only split named like `split` ("train...") is taken, so that a
    local copy may call it differently from the hub.
    """
    # save_to_disk's folders first; loose files can't replace a split of the same name.
    found = {state.parent.name: saved_files(state.parent) for state in folder.glob(f"*/{SAVED}")}
    for path in sorted([*folder.glob("*"), *folder.glob("data/*")]):
        if path.is_file() and (ending := suffix(path)):
            found.setdefault(SHARD.sub("", path.name.removesuffix(ending)), []).append(path)
    alike = [stem for stem in found if stem.startswith(split)]
    if name not in found and len(alike) == 1:
        warn_once(f"{folder}: it has no split {name!r}, so its only one named like {split} is taken: {alike[0]}")
        name = alike[0]
    if name not in found:
        listing = ", ".join(sorted(path.name for path in folder.glob("*"))[:20]) or "nothing"
        missing = f"{folder}: no file of the {split} split {name!r}, such as {name}.jsonl"
        raise MissingSplitError(f"{missing}. Found: {listing}. Rename a file, or set `dataset_{split}_split`.")
    # Anything else would train rows twice, or leave rows out.
    shards = [SHARD.search(path.name.removesuffix(suffix(path))) for path in found[name]]
    numbers = [0] if shards == [None] else sorted(int(shard[1]) if shard else -1 for shard in shards)
    total = 1 if None in shards else int(shards[0][2])
    if numbers != list(range(total)):
        listing = ", ".join(path.name for path in found[name])
        raise DataError(f"{folder}: found {listing} for split {name}, expected one file or all shards of one upload")
    if others := sorted(stem for stem in found if stem.lower().startswith(name.lower()) and stem != name):
        warn_once(f"{folder}: {name} is read, and not: {', '.join(others)}. A mixture reads several splits")
    return found[name]


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files that `Dataset.save_to_disk` wrote; there may be cached ones of `Dataset.map` beside them."""
    return [folder / file["filename"] for file in json.loads((folder / SAVED).read_text())["_data_files"]]


def load_files(paths: list[Path], source: str) -> Dataset:
    if suffix(paths[0]) is None:
        raise DataError(f"{source}: a data file ends in one of {', '.join(BUILDERS)}.")
    builder, files = BUILDERS[suffix(paths[0])], ", ".join(path.name for path in paths)
    # datasets would turn some columns of dialogues into its own structure.
    options = {"parse_agent_traces": False} if builder == "json" else {}
    try:
        # Escaped: `load_dataset` reads names as patterns, and run[1] would be run1.
        names = [glob.escape(str(path)) for path in paths]
        # The cache of datasets goes by path and time: the same path may hold other rows by now (a link, cp -p, rsync -t).
        content = text_fingerprint(b"".join(map(file_digest, paths)))
        dataset = load_dataset(builder, f"content-{content}", data_files=names, split="train", **options)
        if builder == "json" and "timestamp" in str(dataset.features):  # Arrow has made dates of texts
            return Dataset.from_list([row for path in paths for row in read_json(path)])
        dataset.data.validate(full=True)  # that texts are UTF-8, which Parquet files don't ensure
    except StopIteration as error:
        raise DataError(f"{source}: {files} has no rows.") from error
    except (DatasetGenerationError, EOFError, OSError, ValueError) as error:
        if (other := getattr(error, "filename", None)) and Path(other) not in paths:
            raise DataError(f"{source}: the cache of datasets can't be used ({error}). Set HF_HOME") from error
        raise DataError(f"{source}: {files} can't be read as {builder}: {error.__cause__ or error}") from error
    return dataset


def read_json(path: Path) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        text = file.read().lstrip()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]


def load_hub(entry: dict, split: str) -> Dataset:
    path = entry["path"]
    arguments = {key: entry[key] for key in SUBSET_KEYS if entry.get(key)}
    try:
        return load_dataset(path, split=split, **arguments)
    except OSError as error:
        fix = "Check the id, the network and the login (`.venv/bin/hf auth login`), or download it and name its folder"
        raise DataError(f"{path}: the dataset can't be reached on the hub ({error}). {fix}") from error
    except ValueError as error:  # an unknown split or configuration; the message lists those that exist
        raise MissingSplitError(f"{path}: {error} See the recipe's `dataset_*_split`, `dataset_config`.") from error


def suffix(path: Path) -> str | None:
    """The ending by which a data file is read, None for other files."""
    return next((ending for ending in BUILDERS if path.name.endswith(ending)), None)
