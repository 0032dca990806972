"""Where rows come from: hub datasets, local folders and files, and mixtures of them."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from rmipo.data.chat import DataError
from rmipo.recipe.schema import DataConfig

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
HELD_OUT = 0.05  # share of a single local file that becomes its test split
SUBSET_KEYS = ("name", "data_dir", "data_files", "revision")
ENTRY_KEYS = {"path", *SUBSET_KEYS, "split", "test_split", "columns", "fraction", "weight"}


class MissingSplitError(DataError):
    """The data has no such split; everything else about it may be right."""


Convert = Callable[[Dataset, str], Dataset]


def load_rows(data_config: DataConfig, split: str, convert: Convert) -> Dataset:
    """Load a split, bring every source into the same columns, and mix.

    Args:
        data_config: its mixture's entries have TRL's keys (path, name, data_dir, data_files, split,
            columns, fraction) and also `revision`, `test_split`, and the handbook's `weight`: the share of this source
            that is taken, drawn with `mixture_seed`.
        split: "train" or "test".
        convert: called with the rows of one source (columns as published, and `row`) and its name for messages; keeps
            `row`.

    Returns:
        What `convert` returned for all sources, in their order, or shuffled where weights are given. `row` counts
        through the sources one after the other.
    """
    seed = data_config.mixture_seed
    entries = mixture_entries(data_config)
    # With `test_split_size` the test rows are drawn from the training sources.
    source_split = "train" if data_config.test_split_size else split
    sources, first_row = [], 0
    for entry in entries:
        name = entry["path"]
        dataset = load_source(entry, source_split, first_row, data_config)
        if entry.get("columns"):
            check_columns(dataset, entry["columns"], name, "the mixture's `columns`")
            dataset = dataset.select_columns([*entry["columns"], "row"])
        if len(dataset) == 0:
            raise DataError(f"{name}: the {source_split} split has no rows.")
        first_row = dataset[-1]["row"] + 1
        dataset = convert(dataset, name)
        if source_split == "train" and entry.get("weight") is not None:
            dataset = dataset.shuffle(seed=seed).select(range(int(len(dataset) * entry["weight"])))
        sources.append(dataset)
    if source_split == "train":
        sources = take_fractions(sources, [entry.get("fraction") for entry in entries])
    mixed = concatenate_datasets(sources)
    if any(entry.get("weight") is not None for entry in entries):
        mixed = mixed.shuffle(seed=seed)
    if data_config.test_split_size:
        mixed = mixed.train_test_split(test_size=data_config.test_split_size, seed=seed)[split]
    limit = data_config.max_train_samples if split == "train" else data_config.max_eval_samples
    return mixed if limit is None else mixed.select(range(min(limit, len(mixed))))


def mixture_entries(data_config: DataConfig) -> list[dict]:
    """The sources of a `DataConfig` as mixture entries; a single dataset is a mixture of one."""
    if data_config.datasets:
        entries = data_config.datasets
    elif data_config.dataset_name:
        entries = [
            {
                "path": data_config.dataset_name,
                "name": data_config.dataset_config,
                "revision": data_config.dataset_revision,
            }
        ]
    else:
        raise DataError("The recipe names no data: set `dataset_name` (a hub id, folder or file) or `datasets`.")
    problems = []
    for i, entry in enumerate(entries):
        if unknown := sorted(entry.keys() - ENTRY_KEYS):
            problems.append(f"datasets[{i}]: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(ENTRY_KEYS))}")
        if not entry.get("path"):
            problems.append(f"datasets[{i}]: `path` is missing (a hub id, folder or file)")
    shares = [entry.get("fraction") is not None for entry in entries]
    if any(shares) and not all(shares):
        problems.append("datasets: `fraction` must be set for every dataset of the mixture or for none")
    if problems:
        raise DataError("\n".join(problems))
    return entries


def take_fractions(sources: list[Dataset], fractions: list[float | None]) -> list[Dataset]:
    """TRL's meaning of `fraction`: shares of the mixture, which is as large as it can be with no row used twice."""
    if fractions[0] is None:
        return sources
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(source) / weight for source, weight in zip(sources, weights, strict=True) if weight > 0)
    return [source.select(range(round(weight * total))) for source, weight in zip(sources, weights, strict=True)]


def load_source(entry: dict, split: str, first_row: int, data_config: DataConfig) -> Dataset:
    """Rows of one source with the columns they were published with, and `row`: their numbers from `first_row` on."""
    if split == "train":
        name = entry.get("split") or data_config.dataset_train_split
    else:
        name = entry.get("test_split") or data_config.dataset_test_split
    path = Path(entry["path"])
    if path.is_file():
        if suffix(path) is None:
            raise DataError(f"{path}: a data file ends in one of {', '.join(BUILDERS)}.")
        dataset = number_rows(load_files([path], entry["path"]), first_row)
        return dataset if data_config.test_split_size else hold_out(dataset, split, entry["path"])
    if path.is_dir():
        dataset = load_files(find_split(path / (entry.get("data_dir") or ""), name, split), entry["path"])
    elif path.is_absolute() or entry["path"].startswith((".", "~")) or entry["path"].count("/") > 1 or suffix(path):
        raise DataError(f"{entry['path']}: no such file or folder. Paths are relative to the working directory.")
    else:
        dataset = load_hub(entry, name)
    return number_rows(dataset, first_row)


def number_rows(dataset: Dataset, first_row: int) -> Dataset:
    dataset = dataset.remove_columns([name for name in dataset.column_names if name == "row"])
    return dataset.add_column("row", list(range(first_row, first_row + len(dataset))))


def hold_out(dataset: Dataset, split: str, source: str) -> Dataset:
    """The part of a single file that is `split`: its last rows are the test split."""
    test_rows = round(len(dataset) * HELD_OUT)
    if test_rows == 0:
        raise MissingSplitError(
            f"{source}: {len(dataset)} rows are too few to set some aside as test split. Give a folder with a train "
            "and a test file, or set `test_split_size`."
        )
    logger.warning("%s: one file, so its last %d of %d rows are the test split", source, test_rows, len(dataset))
    train_rows = len(dataset) - test_rows
    return dataset.select(range(train_rows) if split == "train" else range(train_rows, len(dataset)))


def find_split(folder: Path, name: str, split: str) -> list[Path]:
    """Files of split `name` in a folder or its data/: `train_prefs.jsonl.gz`, `data/train-00000-of-00002.parquet`.

    Where no file has the recipe's name of a split, the only split named like `split` ("train...") is taken, so that a
    local copy may call it differently from the hub.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("data/*")]):
        if path.is_file() and (ending := suffix(path)):
            stem = re.sub(r"-\d+-of-\d+$", "", path.name.removesuffix(ending))
            found.setdefault(stem, []).append(path)
    alike = [stem for stem in found if stem.startswith(split)]
    if name not in found and len(alike) == 1:
        name = alike[0]
    if name not in found:
        listing = ", ".join(sorted(path.name for path in folder.glob("*"))[:20]) or "nothing"
        raise MissingSplitError(
            f"{folder}: no file of the {split} split {name!r}, such as {name}.jsonl, {name}.jsonl.gz or "
            f"data/{name}-00000-of-00001.parquet. Found: {listing}. Rename a file, or set "
            f"`dataset_{split}_split` (in a mixture `{'split' if split == 'train' else 'test_split'}`)."
        )
    return found[name]


def load_files(paths: list[Path], source: str) -> Dataset:
    builder = BUILDERS[suffix(paths[0])]
    try:
        return load_dataset(builder, data_files=[str(path) for path in paths], split="train")
    except StopIteration as error:
        raise DataError(f"{source}: {', '.join(path.name for path in paths)} holds no rows.") from error
    except DatasetGenerationError as error:
        files = ", ".join(path.name for path in paths)
        raise DataError(f"{source}: {files} can't be read as {builder}: {error.__cause__}") from error


def load_hub(entry: dict, split: str) -> Dataset:
    path = entry["path"]
    arguments = {key: entry[key] for key in SUBSET_KEYS if entry.get(key)}
    try:
        return load_dataset(path, split=split, **arguments)
    except OSError as error:
        raise DataError(
            f"{path}: the dataset can't be reached on the hub ({error}). Check the id and the network (HF_HUB_OFFLINE "
            "is not set?); log in with `hf auth login` if it is gated; or download it where there is a network, "
            f"`hf download --repo-type dataset {path} --local-dir {path.split('/')[-1]}`, and give that folder "
            "instead of the id."
        ) from error
    except ValueError as error:  # an unknown split or configuration; the message lists those that exist
        raise MissingSplitError(f"{path}: {error} See the recipe's `dataset_*_split`, `dataset_config`.") from error


def check_columns(dataset: Dataset, needed: list[str], source: str, wanted_by: str) -> None:
    found = [column for column in dataset.column_names if column != "row"]
    if missing := [column for column in needed if column not in found]:
        raise DataError(f"{source}: missing columns {', '.join(missing)}, found {', '.join(found)}. {wanted_by}")


def suffix(path: Path) -> str | None:
    """The ending by which a data file is read, None for other files."""
    return next((ending for ending in BUILDERS if path.name.endswith(ending)), None)
