"""Dialogues for SFT: loaded, the unusable ones dropped, and measured as TRL will cut them."""

import numpy as np
from datasets import Dataset, Features, Value
from trl import SFTConfig

from rmipo.data.chat import ChatFormat, render, tokenize
from rmipo.data.convert import code_digest, load_converted
from rmipo.data.formats import DIALOGUES, unusable_dialogue
from rmipo.data.report import DataReport, rows_by_reason
from rmipo.fingerprints import json_fingerprint
from rmipo.recipe.schema import DataConfig


def load_dialogues(data_config: DataConfig, split: str) -> Dataset:
    """Column `messages`, which may still be unusable, and `row`; see `load_converted`."""
    return load_converted(data_config, split, DIALOGUES, ("messages",))


def select_dialogues(
    dataset: Dataset, chat: ChatFormat, data_config: DataConfig, args: SFTConfig
) -> tuple[Dataset, DataReport]:
    """Drop the dialogues that can't be trained on, and count those that TRL cuts to `max_length` tokens.

    TRL tokenises the same text once more: it takes messages. A column `ids` has a fingerprint of each dialogue's token ids.

    Raises:
        DataError: more are unusable or cut than the recipe allows, or none is left.
    """
    reasons = [unusable_dialogue(messages) for messages in dataset["messages"]]
    report = DataReport(rows=len(dataset), dropped=rows_by_reason(reasons, dataset["row"]))
    report.check_dropped(data_config.max_dropped_fraction)
    kept = dataset.select([i for i, reason in enumerate(reasons) if reason is None])
    measured = kept.map(
        count_tokens,
        batched=True,
        fn_kwargs={"chat": chat, "code": code_digest()},
        features=Features(kept.features | {"tokens": Value("int64"), "ids": Value("string")}),
        num_proc=data_config.dataset_num_proc,
        desc="Measuring dialogues",
    )
    lengths = np.array(measured["tokens"])
    limit = np.inf if args.max_length is None else args.max_length
    split = args.packing and args.packing_strategy != "bfd"  # a long dialogue goes on in the next block
    report.measure({"messages": np.minimum(lengths, limit)}, {"messages": (lengths > limit) & (not split)})
    report.check_cut(data_config.max_truncated_fraction, f"max_length ({args.max_length})")
    return measured.remove_columns("tokens"), report


def count_tokens(batch: dict, chat: ChatFormat, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`."""
    texts = [render(chat.tokenizer, messages, False) for messages in batch["messages"]]
    encoded = tokenize(chat.tokenizer, texts)
    return {"tokens": [len(ids) for ids in encoded], "ids": [json_fingerprint(ids) for ids in encoded]}
