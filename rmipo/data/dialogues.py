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
MEASURED = {"tokens": Value("int64"), "start": Value("int64"), "problem": Value("string"), "marked": Value("bool")}


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
    completions = sum(map(bool, dataset["completion"]))
    if args.completion_only_loss and completions < len(dataset):
        count = f"{len(dataset) - completions} of {len(dataset)} rows"
        raise DataError(
            f"completion_only_loss: {count} are dialogues. assistant_only_loss trains the answers of any row"
        )
    # TRL's default: rows with a completion train it alone. Of a mixture only whole dialogues can be trained in one run.
    alone = completions == len(dataset) and args.completion_only_loss is not False
    if alone:
        loss_on = (
            "completions alone, as rows have a prompt and a completion (completion_only_loss: false puts it on both)"
        )
    elif args.assistant_only_loss:
        loss_on = None
    elif completions and args.completion_only_loss is None:
        loss_on = f"whole dialogues, prompts included, as only {completions} of {len(dataset)} rows have a completion"
    else:
        loss_on = "whole dialogues, users' turns included (assistant_only_loss: true trains the answers alone)"
    measured = dataset.map(
        measure,
        batched=True,
        fn_kwargs={"chat": chat, "alone": alone, "code": code_digest()},
        features=Features(dataset.features | MEASURED | {"ids": Value("string")}),
        num_proc=data_config.dataset_num_proc,
        desc="Measuring dialogues",
    )
    limit = np.inf if args.max_length is None else args.max_length
    split = args.packing and args.packing_strategy != "bfd"  # a long dialogue goes on in the next block
    reasons = measured["problem"][:]
    if not split and args.truncation_mode == "keep_start":  # TRL would drop them in silence
        filled = ["the prompt fills the window" if start >= limit else None for start in measured["start"]]
        reasons = [reason or full for reason, full in zip(reasons, filled, strict=True)]
    report = DataReport(len(dataset), rows_by_reason(reasons, measured["row"]), loss_on)
    report.note_markers(np.array(measured["row"])[np.array(measured["marked"])].tolist())
    report.check_dropped(data_config.max_dropped_fraction)
    kept = measured.select([i for i, reason in enumerate(reasons) if reason is None])
    lengths = np.array(kept["tokens"])
    report.measure({"messages": np.minimum(lengths, limit)}, {"messages": (lengths > limit) & (not split)})
    report.check_cut(data_config.max_truncated_fraction, f"max_length ({args.max_length})")
    if alone:
        kept = kept.map(divide, desc="Dividing prompts and completions")
    return kept.remove_columns(["messages" if alone else "completion", *MEASURED]), report


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


def measure(batch: dict, chat: ChatFormat, alone: bool, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`.

    `problem`: why the dialogue can't be trained on. `start`: tokens in front of the first answer that is trained: a
    window without one would train what users say.
    """
    texts, prompts, problems = [], [], []
    for messages, completion in zip(batch["messages"], batch["completion"], strict=True):
        text = prompt = ""
        # Before it is rendered: templates raise on some of these, or write them in silence.
        problem = unusable_dialogue(messages)
        if alone and messages == completion:
            problem = problem or "the prompt is empty"
        if problem is None:
            # A usable dialogue ends with an answer, so there is one.
            first = len(messages) - len(completion) if alone else 0
            while messages[first]["role"] != "assistant":
                first += 1
            try:
                text = render(chat.tokenizer, messages, False)
                prompt = render(chat.tokenizer, messages[:first], True) if first else ""
                require_contents(messages, text)
            except DataError as error:
                problem = str(error)
        texts.append(text)
        prompts.append(prompt)
        problems.append(problem)
    encoded = tokenize(chat.tokenizer, texts)
    return {
        "tokens": [len(ids) for ids in encoded],
        "start": [len(ids) for ids in tokenize(chat.tokenizer, prompts)],
        "problem": problems,
        "marked": [has_markers(messages) for messages in batch["messages"]],
        "ids": [json_fingerprint(ids) for ids in encoded],
    }


def divide(row: dict) -> dict:
    return {"prompt": row["messages"][: -len(row["completion"])]}
