"""Dialogues for SFT: loaded, the unusable ones dropped, and measured as TRL will cut them."""

import numpy as np
from datasets import Dataset, Features, Value
from trl import SFTConfig

from rmipo.data.chat import ChatFormat, DataError, render, require_contents, tokenize
from rmipo.data.formats import MESSAGES, DataReport, code_digest, read_dialogue, unusable_dialogue
from rmipo.data.sources import load_converted
from rmipo.fingerprints import json_fingerprint
from rmipo.recipe.schema import DataConfig

MEASURED = {"prompt": MESSAGES, "tokens": Value("int64"), "problem": Value("string"), "ids": Value("string")}


def load_dialogues(data_config: DataConfig, split: str) -> Dataset:
    """Column `messages`, which may still be unusable, and `row`; see `load_converted`.

    `completion` has the last of the messages where a row is a prompt and its completion; it is empty for dialogues.
    """
    return load_converted(data_config, split, read_dialogue, ("messages", "completion"))


def select_dialogues(
    dataset: Dataset, chat: ChatFormat, data_config: DataConfig, args: SFTConfig
) -> tuple[Dataset, DataReport]:
    """Drop the dialogues that can't be trained on, and count those that TRL cuts to `max_length` tokens.

    TRL tokenises the same text once more: it takes messages, or where the loss is on completions alone `prompt` and
    `completion`. A column `ids` has a fingerprint of each dialogue's token ids.

    Raises:
        DataError: more are unusable or cut than the recipe allows, or none is left; `completion_only_loss` of dialogues.
    """
    completions = sum(map(bool, dataset["completion"]))
    if args.completion_only_loss and completions < len(dataset):
        count = f"{len(dataset) - completions} of {len(dataset)} rows"
        raise DataError(f"completion_only_loss: {count} are dialogues. assistant_only_loss trains answers of any row")
    # TRL's default: rows with a completion train it alone. Of a mixture only whole dialogues can be trained in one run.
    alone = completions == len(dataset) and args.completion_only_loss is not False
    # A long dialogue goes on in the next block where packing doesn't cut it.
    uncut = args.max_length is None or (args.packing and args.packing_strategy != "bfd")
    limit = np.inf if uncut else args.max_length
    measured = dataset.map(
        measure,
        fn_kwargs={"chat": chat, "alone": alone, "window": limit, "code": code_digest()},
        features=Features(dataset.features | MEASURED),
        num_proc=data_config.dataset_num_proc,
        desc="Measuring dialogues",
    )
    tokens, reasons = np.array(measured["tokens"]), measured["problem"][:]
    report = DataReport(measured["row"], reasons, {"messages": np.minimum(tokens, limit)}, {"messages": tokens > limit})
    report.check(data_config.max_dropped_fraction, data_config.max_truncated_fraction)
    kept = measured.select([i for i, reason in enumerate(reasons) if reason is None])
    return kept.select_columns([*(("prompt", "completion") if alone else ("messages",)), "row", "ids"]), report


def measure(row: dict, chat: ChatFormat, alone: bool, window: float, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`.

    `problem`: why the dialogue can't be trained on. A window without an answer would train what users say.
    """
    messages, ids = row["messages"], []
    prompt = messages[: len(messages) - len(row["completion"])]
    # Before it is rendered: templates raise on some of these, or write them in silence.
    problem = unusable_dialogue(messages)
    if alone and not prompt:
        problem = problem or "the prompt is empty"
    if problem is None:
        # A usable dialogue ends with an answer, so there is one.
        first = len(prompt) if alone else 0
        while messages[first]["role"] != "assistant":
            first += 1
        try:
            text = render(chat.tokenizer, messages, False)
            require_contents(messages, text)
            ids = tokenize(chat.tokenizer, text)
            start = render(chat.tokenizer, messages[:first], True) if first else ""
            if len(tokenize(chat.tokenizer, start)) >= window:
                problem = "the prompt fills the window"  # TRL would drop it in silence
        except DataError as error:
            problem = str(error)
    return {"prompt": prompt, "tokens": len(ids), "problem": problem, "ids": json_fingerprint(ids)}
