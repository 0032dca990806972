"""Dialogues for SFT: loaded, the unusable ones dropped, and measured as TRL will cut them."""

import re

import numpy as np
from datasets import Dataset, Features, Value
from trl import SFTConfig

from rmipo.data.chat import ANSWER, QUESTION, ChatFormat, DataError, render, require_contents, tokenize
from rmipo.data.convert import MESSAGES, code_digest, load_converted
from rmipo.data.formats import DIALOGUES, has_markers, unusable_dialogue
from rmipo.data.report import DataReport, rows_by_reason
from rmipo.fingerprints import json_fingerprint
from rmipo.recipe.schema import DataConfig

COLUMNS = {"messages": MESSAGES, "completion": MESSAGES}
TEXTS = dict.fromkeys(("ids", "problem"), Value("string"))


def load_dialogues(data_config: DataConfig, split: str) -> Dataset:
    """Column `messages`, which may still be unusable, and `row`; see `load_converted`.

    `completion` has the last of the messages where a row is a prompt and its completion; it is empty for dialogues.
    """
    return load_converted(data_config, split, DIALOGUES, COLUMNS)


def select_dialogues(
    dataset: Dataset, chat: ChatFormat, data_config: DataConfig, args: SFTConfig
) -> tuple[Dataset, DataReport]:
    """Drop the dialogues that can't be trained on, and count those that TRL cuts to `max_length` tokens.

    TRL tokenises the same text once more: it takes messages, or where the loss is on completions alone `prompt` and
    `completion`. A column `ids` has a fingerprint of each dialogue's token ids.

    Raises:
        DataError: more are unusable or cut than the recipe allows, or none is left; `completion_only_loss` of dialogues.
    """
    if args.assistant_only_loss:
        check_generation_marks(chat)
    completions = sum(bool(completion) for completion in dataset["completion"])
    if args.completion_only_loss and completions < len(dataset):
        count = f"{len(dataset) - completions} of {len(dataset)} rows"
        raise DataError(
            f"completion_only_loss: {count} are dialogues. assistant_only_loss trains the answers of any row"
        )
    # TRL's default: rows with a completion train it alone. Of a mixture only whole dialogues can be trained in one run.
    alone = completions == len(dataset) and args.completion_only_loss is not False
    if not alone:
        dataset = dataset.remove_columns("completion")
    # Before anything is rendered: templates raise on some of these, or write them in silence.
    reasons = [unusable_dialogue(messages) for messages in dataset["messages"]]
    if alone:
        columns = zip(reasons, dataset["messages"], dataset["completion"], strict=True)
        reasons = [
            reason or ("the prompt is empty" if messages == completion else None)
            for reason, messages, completion in columns
        ]
    report = DataReport(rows=len(dataset), dropped=rows_by_reason(reasons, dataset["row"]))
    if alone:
        report.loss_on = (
            "completions alone, as rows have a prompt and a completion (completion_only_loss: false puts it on both)"
        )
    elif completions and args.completion_only_loss is None and not args.assistant_only_loss:
        report.loss_on = (
            f"whole dialogues, prompts included, as only {completions} of {len(dataset)} rows have a completion"
        )
    elif not args.assistant_only_loss:
        report.loss_on = "whole dialogues, users' turns included (assistant_only_loss: true trains the answers alone)"
    rows = zip(dataset["row"], dataset["messages"], strict=True)
    report.note_markers([row for row, messages in rows if has_markers(messages)])
    report.check_dropped(data_config.max_dropped_fraction)
    kept = dataset.select([i for i, reason in enumerate(reasons) if reason is None])
    measured = kept.map(
        count_tokens,
        batched=True,
        fn_kwargs={"chat": chat, "code": code_digest()},
        features=Features(kept.features | dict.fromkeys(("tokens", "start"), Value("int64")) | TEXTS),
        num_proc=data_config.dataset_num_proc,
        desc="Measuring dialogues",
    )
    limit = np.inf if args.max_length is None else args.max_length
    split = args.packing and args.packing_strategy != "bfd"  # a long dialogue goes on in the next block
    reasons = measured["problem"][:]
    if not split and args.truncation_mode == "keep_start":  # TRL would drop them in silence
        filled = ["the prompt fills the window" if start >= limit else None for start in measured["start"]]
        reasons = [reason or full for reason, full in zip(reasons, filled, strict=True)]
    report.dropped |= rows_by_reason(reasons, measured["row"])
    report.check_dropped(data_config.max_dropped_fraction)
    measured = measured.select([i for i, reason in enumerate(reasons) if reason is None])
    report.lost_start = args.truncation_mode == "keep_end"
    lengths = np.array(measured["tokens"])
    report.measure({"messages": np.minimum(lengths, limit)}, {"messages": (lengths > limit) & (not split)})
    report.check_cut(data_config.max_truncated_fraction, f"max_length ({args.max_length})")
    if alone:
        measured = measured.map(divide, remove_columns="messages", desc="Dividing prompts and completions")
    return measured.remove_columns(["tokens", "start", "problem"]), report


def check_generation_marks(chat: ChatFormat) -> None:
    """Raises DataError where `{% generation %}` in the template, from which TRL takes the answers, is around other text."""
    if not re.search(r"\{%-?\s*generation\b", chat.tokenizer.chat_template):
        return  # TRL adds the marks, or refuses the template
    encoded = chat.tokenizer.apply_chat_template(
        [QUESTION, ANSWER], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    text = chat.tokenizer.decode(marked)
    if ANSWER["content"] not in text or QUESTION["content"] in text:
        raise DataError(
            f"chat_template: {{% generation %}} marks {text!r}: expected it around the assistant's text alone"
        )


def count_tokens(batch: dict, chat: ChatFormat, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`.

    `start`: tokens in front of the first answer: a window without one would train what users say.
    `problem`: why the template doesn't render the dialogue, if it doesn't.
    """
    texts, prompts, problems = [], [], []
    for number, messages in enumerate(batch["messages"]):
        first = len(messages) - len(batch["completion"][number]) if "completion" in batch else 0
        # A usable dialogue ends with an answer, so there is one.
        while messages[first]["role"] != "assistant":
            first += 1
        text, prompt, problem = "", "", None
        try:
            text = render(chat.tokenizer, messages, False)
            prompt = render(chat.tokenizer, messages[:first], True) if first else ""
            require_contents(messages, text)
        except DataError as error:
            problem = str(error)
        for values, value in zip((texts, prompts, problems), (text, prompt, problem), strict=True):
            values.append(value)
    encoded = tokenize(chat.tokenizer, texts)
    starts = [len(ids) for ids in tokenize(chat.tokenizer, prompts)]
    return {
        "tokens": [len(ids) for ids in encoded],
        "start": starts,
        "ids": [json_fingerprint(ids) for ids in encoded],
        "problem": problems,
    }


def divide(row: dict) -> dict:
    return {"prompt": row["messages"][: -len(row["completion"])]}
