"""From files to messages: the rows of every source of a recipe, read and mixed; both splits."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from rmipo.data.chat import DataError
from rmipo.data.formats import OUR_COLUMNS, Format, missing_columns, read_row
from rmipo.data.report import name_rows, of_split, rows_by_reason
from rmipo.data.sources import MissingSplitError, load_sources, mix, warn_once
from rmipo.fingerprints import code_fingerprint
from rmipo.recipe.schema import DataConfig

logger = logging.getLogger(__name__)

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FORMATS = "docs/DATA.md shows the accepted formats"
SHAPING = ("transformers", "tokenizers", "jinja2", "trl", "datasets")  # libraries that token ids depend on


def load_converted(
    data_config: DataConfig, split: str, formats: Sequence[Format], sides: Mapping[str, List]
) -> Dataset:
    """The rows of a split ("train" or "test") as messages.

    Args:
        sides: names and types of what the formats read, most of them MESSAGES.

    Returns:
        A column for each of `sides`, and `row`: row number in the source.

    Raises:
        DataError: sources that can't be read, missing columns, values that aren't messages or texts.
    """
    sources = load_sources(data_config, split)
    with of_split(split):
        converted = [convert_rows(rows, name, formats, sides, data_config.dataset_num_proc) for name, rows in sources]
    return mix(converted, data_config, split)


def load_splits(
    load: Callable[[DataConfig, str], Dataset], data_config: DataConfig, evaluating: bool
) -> dict[str, Dataset]:
    """`load` of "train", and of "test" where there is such a split.

    Args:
        load: `load_pairs` or `load_dialogues`.
        evaluating: the recipe evaluates during training: then a missing test split is a DataError.
    """
    splits = {"train": load(data_config, "train")}
    try:
        # A missing test split is no mistake where nothing is evaluated.
        splits["test"] = load(data_config, "test")
    except MissingSplitError as error:
        if evaluating:
            raise DataError(f"{error} Or train without evaluation: eval_strategy: no.") from error
        logger.warning("no evaluation, since there is no test split: %s", error)
    return splits


def convert_rows(
    rows: Dataset, source: str, formats: Sequence[Format], sides: Mapping[str, List], num_proc: int | None
) -> Dataset:
    """Read every row by one of `formats`; all rows that can't be read make one DataError."""
    if missing := missing_columns(rows.column_names, formats):
        found = ", ".join(name for name in rows.column_names if name != "row")
        raise DataError(f"{source}: missing columns {', '.join(missing)}, found {found}. {FORMATS}")
    # Rows are read by the first format that fits. Of pairs, a `prompt` beside dialogues is compared with them.
    fitting = next(form.columns for form in formats if set(form.columns) <= set(rows.column_names))
    read = {"row", "system", *OUR_COLUMNS, *fitting, *(("prompt",) if "chosen" in fitting else ())}
    if unread := [name for name in rows.column_names if name not in read]:
        warn_once(f"{source}: columns that are not read: {', '.join(name or '(unnamed)' for name in unread)}")
    # In processes of their own (num_proc): a row's problem is returned with it, as an exception would name no other rows.
    converted = rows.map(
        read_batch,
        batched=True,
        fn_kwargs={"formats": formats, "sides": [*sides], "code": code_digest()},
        remove_columns=[name for name in rows.column_names if name != "row"],
        features=Features(
            {**sides, "problem": Value("string"), "unread": List(Value("string")), "row": Value("int64")}
        ),
        num_proc=num_proc,
        desc=f"Reading {source}",
    )
    # Rows of the wrong type are an error whatever their number: dropping some would hide a wrong column. Rows that are of the
    # right type but can't be trained on are counted against max_dropped_fraction later.
    problems = rows_by_reason(converted["problem"], converted["row"])
    if problems:
        lines = [f"- {problem}: {name_rows(numbers)}" for problem, numbers in problems.items()]
        raise DataError("\n".join([f"{source}: rows that can't be read. {FORMATS}", *lines]))
    if unread := pc.unique(pc.list_flatten(converted.data["unread"])).to_pylist():
        warn_once(f"{source}: keys of messages that are not read: {', '.join(unread)}")
    return converted.remove_columns(["problem", "unread"])


def read_batch(batch: dict, formats: Sequence[Format], sides: Sequence[str], code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`."""
    out = {name: [] for name in (*sides, "problem", "unread", "row")}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        number = row.pop("row")
        try:
            messages, problem = read_row(row, formats), None
        except DataError as error:  # kept with the row: all rows with one reason are named together
            messages, problem = [[] for _ in sides], str(error)
        for name, value in zip(out, [*messages, problem, unread_keys(row), number], strict=True):
            out[name].append(value)
    return out


def unread_keys(row: dict) -> list[str]:
    """The keys of a row's messages that say something and are not read."""
    read = {"role", "content"}
    messages = [item for value in row.values() if isinstance(value, list) for item in value if isinstance(item, dict)]
    unread = {key for message in messages if "role" in message for key in message if message[key] is not None}
    prompt, dialogue = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str) and isinstance(dialogue, list):  # UltraFeedback repeats its first turn there
        said = {str(message.get("content")).strip() for message in dialogue}
        unread |= set() if prompt.strip() in said else {"prompt (a text that is no turn of the dialogue)"}
    return sorted(unread - read)


@functools.cache
def code_digest() -> str:
    """Of what shapes messages and token ids besides rows and tokenizer: this package's code, and its libraries.

    `Dataset.map` names its cache after its function and arguments, but not after the functions that those call: without
    this, rows prepared by another version of this repository or of transformers would be taken for today's.
    """
    return code_fingerprint(Path(__file__).parent, SHAPING)
