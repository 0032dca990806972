"""Where rows come from: hub datasets, local folders and files, and mixtures of them."""

import functools
import glob
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from rmipo.data.chat import DataError
from rmipo.data.formats import Reader, convert_rows
from rmipo.fingerprints import file_digest, text_fingerprint
from rmipo.recipe.schema import DataConfig

logger = logging.getLogger(__name__)

FILE = re.compile(r"\.(json|parquet|arrow)l?(\.gz)?$")  # the end of a data file's name, with its builder
SHARD = re.compile(r"-(\d+)-of-(\d+)")
SAVED = "data-*-of-*.arrow"  # what `Dataset.save_to_disk` writes into a folder, beside caches of `map`
HELD_OUT = 0.05  # share of local data without splits that becomes its test split


class MissingSplitError(DataError):
    """The data has no such split; everything else about it may be right."""


def load_splits(
    load: Callable[[DataConfig, str], Dataset], data_config: DataConfig, evaluating: bool
) -> dict[str, Dataset]:
    """`load` (`load_pairs` or `load_dialogues`) of "train", and of "test" where there is such a split.

    Raises DataError where there is none and the recipe is `evaluating` during training.
    """
    splits = {"train": load(data_config, "train")}
    try:
        splits["test"] = load(data_config, "test")
    except MissingSplitError as error:
        if evaluating:
            raise DataError(f"{error} Or train without evaluation: eval_strategy: no.") from error
        logger.warning("no evaluation, since there is no test split: %s", error)
    return splits


def load_converted(data_config: DataConfig, split: str, read: Reader, sides: Sequence[str]) -> Dataset:
    """The rows of a split ("train" or "test") as messages. Raises DataError for sources or a row that can't be read.

    Args:
        read: of `data.formats`, what reads a row.
        sides: names for what it returns, which become columns of messages beside `row`, the row's number.
    """
    options = {"read": read, "sides": sides, "num_proc": data_config.dataset_num_proc}
    return load_rows(data_config, split, functools.partial(convert_rows, **options))


def load_rows(data_config: DataConfig, split: str, convert: Callable[[Dataset, str], Dataset]) -> Dataset:
    """The rows of `split`, "train" or "test", of all sources.

    A `weight` is the share of its source that is taken, drawn with `mixture_seed`; a `fraction` is TRL's. The rows are in
    the order of the sources, or shuffled where weights are given. With `test_split_size` both splits are drawn from the
    training rows; `max_*_samples` come last.

    `convert` gives the same columns for every source. It gets the rows as they are published, with `row`, which counts
    through the sources one after the other, and a name for messages.
    """
    seed, size, entries = data_config.mixture_seed, data_config.test_split_size, mixture_entries(data_config)
    weights = [entry.get("weight") for entry in entries]
    sources, first_row = [], 0
    for entry, weight in zip(entries, weights, strict=True):
        rows, divided = load_source(entry, "train" if size else split, data_config)
        # Numbered before anything is dropped or shuffled: messages name rows by their place in the file.
        rows = rows.remove_columns([name for name in rows.column_names if name == "row"])
        rows = rows.add_column("row", list(range(first_row, first_row + len(rows))))
        first_row += len(rows)
        if not (divided or size):
            rows = hold_out(rows, split, entry["path"])
        if columns := entry.get("columns"):  # TRL's key
            rows = rows.select_columns([*columns, "row"])
        # Shares are of training data; a test split is measured whole, so that its metrics do not change with the mixture.
        if weight and (split == "train" or size):
            rows = rows.shuffle(seed=seed).select(range(int(len(rows) * weight)))  # rounded down, as in the handbook
        sources.append(rows)
    if entries[0].get("fraction") and (split == "train" or size):  # of all sources, or of none
        # TRL's meaning: shares of the mixture, which is as large as the source that is scarcest for its share allows.
        total = min(len(rows) / entry["fraction"] for rows, entry in zip(sources, entries, strict=True))
        sizes = [round(entry["fraction"] * total) for entry in entries]
        sources = [rows.select(range(size)) for rows, size in zip(sources, sizes, strict=True)]
    converted = [convert(rows, f"{split}: {entry['path']}") for rows, entry in zip(sources, entries, strict=True)]
    mixed = concatenate_datasets(converted)
    # In the handbook's recipes, where weights come from, the mixture is shuffled too; TRL's fractions leave it in order.
    if any(weights):
        mixed = mixed.shuffle(seed=seed)
    if size:
        mixed = mixed.train_test_split(test_size=size, seed=seed)[split]
    limit = data_config.max_train_samples if split == "train" else data_config.max_eval_samples
    return mixed if limit is None else mixed.select(range(min(limit, len(mixed))))


def mixture_entries(data_config: DataConfig) -> list[dict]:
    """The sources of a `DataConfig` as mixture entries; a single dataset is a mixture of one."""
    if data_config.datasets:
        return data_config.datasets
    if data_config.dataset_name:
        subset = {"name": data_config.dataset_config, "revision": data_config.dataset_revision}
        return [{"path": data_config.dataset_name, **subset}]
    raise DataError("The recipe names no data: set `dataset_name` (a hub id, folder or file) or `datasets`.")


def hold_out(dataset: Dataset, split: str, source: str) -> Dataset:
    """The part of data without splits that is `split`; which rows are held out is drawn, as the data may be sorted.

    They are the same in every program: no seed of a recipe moves rows between an SFT stage's training and a later test.
    """
    if test_rows := round(len(dataset) * HELD_OUT):
        return dataset.train_test_split(test_size=test_rows, seed=0)[split]
    if split == "test":
        raise MissingSplitError(f"{source}: {len(dataset)} rows are too few for a test split. Set `test_split_size`.")
    return dataset


def load_source(entry: dict, split: str, data_config: DataConfig) -> tuple[Dataset, bool]:
    """Rows of one source with the columns they were published with, and whether the source is divided into splits."""
    name = entry.get("split" if split == "train" else "test_split") or getattr(data_config, f"dataset_{split}_split")
    source, path, divided = entry["path"], Path(entry["path"]), True
    arguments = {key: entry[key] for key in ("name", "data_dir", "data_files", "revision") if entry.get(key)}
    builder = source
    if path.exists():
        folder = path / arguments.pop("data_dir", "")
        # What only datasets of the hub have would have no effect, in silence.
        if arguments or (path.is_file() and name not in ("train", "test")):
            unread = ", ".join(arguments) or f"the split {name!r} of a file"
            raise DataError(f"{source} is local, and {unread} would have no effect. Remove it")
        undivided = [path] if path.is_file() else sorted(folder.glob(SAVED))
        files, divided = undivided or find_split(folder, name, split), not undivided
        if (kind := FILE.search(files[0].name)) is None:
            raise DataError(f"{source}: a data file ends in .jsonl, .json or .parquet")
        # Escaped: `load_dataset` reads names as patterns, and run[1] would be run1.
        builder, name, arguments = kind[1], "train", {"data_files": [glob.escape(str(file)) for file in files]}
        # The cache goes by path and time: the same path may hold other rows by now (a link, cp -p, rsync -t).
        arguments["name"] = f"content-{text_fingerprint(b''.join(map(file_digest, files)))}"
        source = f"{source}: {files[0].name}"
    try:
        return load_dataset(builder, split=name, **arguments), divided
    except (DatasetGenerationError, OSError, StopIteration) as error:
        why = error.__cause__ or str(error) or "it has no rows"
        fix = "Check the path or id, the content, the network and the login (`.venv/bin/hf auth login`)"
        raise DataError(f"{source} can't be read: {why}. {fix}") from error
    except ValueError as error:  # an unknown split or configuration; the message lists those that exist
        raise MissingSplitError(f"{source}: {error} See the recipe's `dataset_*_split`, `dataset_config`.") from error


def find_split(folder: Path, name: str, split: str) -> list[Path]:
    """Files of split `name`: `train.jsonl.gz`, `data/train-00000-of-00002.parquet`, or what `DatasetDict` saved."""
    patterns = (f"{name}/{SAVED}", f"{name}.*", f"{name}-*-of-*", f"data/{name}.*", f"data/{name}-*-of-*")
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if FILE.search(path.name)]
    if not files:
        missing = f"{folder}: no file of the {split} split {name!r}, such as {name}.jsonl"
        raise MissingSplitError(f"{missing}. Rename a file, or set `dataset_{split}_split`.")
    # Anything else would train rows twice, or leave rows out.
    shards = [SHARD.search(path.name) for path in files]
    expected = [(number, len(files)) for number in range(len(files))]
    if shards != [None] and [shard and (int(shard[1]), int(shard[2])) for shard in shards] != expected:
        found = ", ".join(path.name for path in files)
        raise DataError(f"{folder}: found {found} for split {name}, expected one file or all shards of one upload")
    return files
