"""The formats in which preference pairs, dialogues and prompts are published, read as messages; which rows are used."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from trl import extract_prompt

from rmipo.data.chat import DataError, Messages
from rmipo.fingerprints import code_fingerprint

Sides = tuple[Messages, ...]
Row = dict[str, Any]
Reader = Callable[[Row], Sides]

MESSAGES = List({"role": Value("string"), "content": Value("string")})
ROLES = ("system", "user", "assistant")
SIDES = ("prompt", "chosen", "rejected")
# What templates write into a prompt, and what is not passed on to them: such rows would be trained without it.
UNREAD_COLUMNS = ("system_prompt", "system_message", "history", "tools", "images", "chat_template_kwargs")
UNREAD_KEYS = ("tools", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images")
# Which turns to train, in OpenAI's and Axolotl's formats: TRL has no such mask, and every turn would be trained.
UNREAD_KEYS += ("weight", "train")


def read_pair(row: Row) -> Sides:
    """Prompt, chosen, rejected. Two dialogues, UltraFeedback-binarized's or Anthropic-HH texts, share turns: the prompt."""
    chosen, rejected = (read_turns(row, side, "assistant") for side in SIDES[1:])
    if not all(side and side[0]["role"] != "assistant" for side in (chosen, rejected)):
        return read_turns(row, "prompt", "user"), chosen, rejected
    # TRL's rule of what two dialogues share, so that the same file gives the same pairs there and here.
    shared = extract_prompt({"chosen": chosen, "rejected": rejected})
    # As text it may be anything: UltraFeedback repeats the first user turn there.
    if isinstance(row.get("prompt"), list):
        own = read_turns(row, "prompt", "user")
        if shared["prompt"][: len(own)] != own:
            raise DataError("`prompt` differs from the turns that `chosen` and `rejected` share: keep one of them")
    return tuple(shared[side] for side in SIDES)


def read_dialogue(row: Row) -> Sides:
    """All messages; and the last of them where a row is a prompt with its completion, else none."""
    if "messages" in row:
        return read_turns(row, "messages", "user"), []
    completion = read_turns(row, "completion", "assistant")
    return read_turns(row, "prompt", "user") + completion, completion


def read_prompt(row: Row) -> Sides:
    """A prompt, which may be that of a dialogue or of a pair."""
    if row.get("chosen") is not None:
        return read_pair(row)[:1]
    if row.get("prompt") is not None or "messages" not in row:
        return (read_turns(row, "prompt", "user"),)
    messages = read_turns(row, "messages", "user")
    return (messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages,)


def read_turns(row: Row, column: str, role: str) -> Messages:
    """Messages of a cell: a list of messages, an Anthropic-HH text, or a text spoken by `role`. None is empty text."""
    if column not in row:
        raise DataError(f"there is no {column}, found the columns {', '.join(row)}")
    value = "" if row[column] is None else row[column]
    if isinstance(value, str):  # an empty text is dropped later, with its reason
        # Marks count after a blank line, and only where the text starts with one: "Human:" may also be quoted.
        turns = re.split(r"\n\n(Human|Assistant):", value)
        if turns[0].strip() == "" and len(turns) > 1:
            return read_hh(turns, open_end=column == "prompt")
        return [{"role": role, "content": value}]
    messages = []
    for message in value if isinstance(value, list) else [value]:
        found = message if isinstance(message, dict) else {}
        if found.get("role") not in ROLES or not isinstance(found.get("content", 0), str | None):
            expected = f"messages with role ({', '.join(ROLES)}) and text as content"
            raise DataError(f"`{column}` has {str(message)[:80]}, expected {expected}")
        if unread := [key for key in UNREAD_KEYS if found.get(key) not in (None, "", [], {})]:
            raise DataError(f"`{column}` has messages with {', '.join(unread)}, which is not supported: remove the key")
        messages.append({"role": found["role"], "content": found["content"] or ""})
    return messages


def read_hh(turns: list[str], open_end: bool) -> Messages:
    """Anthropic-HH text, split at its speaker marks; the text after the last "Assistant:" is the response.

    A prompt column may end in an open "Assistant:", which is not a turn.
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    spoken = zip(turns[1::2], turns[2::2], strict=True)
    messages = [{"role": roles[speaker], "content": text.strip()} for speaker, text in spoken]
    if open_end and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # generation would have to continue it
    return messages


def convert_rows(rows: Dataset, source: str, read: Reader, sides: Sequence[str], num_proc: int | None) -> Dataset:
    """See `load_converted`. One row that can't be read is an error: dropping it might hide a wrong column."""
    return rows.map(
        read_one,
        fn_kwargs={"source": source, "read": read, "sides": sides, "code": code_digest()},
        remove_columns=[name for name in rows.column_names if name != "row"],
        features=Features(dict.fromkeys(sides, MESSAGES) | {"row": Value("int64")}),
        num_proc=num_proc,
        desc=f"Reading {source}",
    )


def read_one(row: dict, source: str, read: Reader, sides: Sequence[str], code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`."""
    fields = dict(row)
    number = fields.pop("row")
    try:
        return dict(zip(sides, read_row(fields, read), strict=True))
    except DataError as error:
        raise DataError(f"{source}: row {number}: {error}. docs/DATA.md shows the accepted formats") from error


def read_row(row: Row, read: Reader) -> Sides:
    """The messages of a row by one of the functions above. Raises DataError with what is wrong."""
    for name in UNREAD_COLUMNS:
        if row.get(name):
            raise DataError(f"`{name}` is part of the prompt, but is not supported: remove the column, or render it")
    first, *others = read(row)
    message = {"role": "system", "content": row.get("system")}
    if message["content"] and first[:1] != [message]:  # the column may repeat it
        first = [message, *first]
    return first, *others


@functools.cache
def code_digest() -> str:
    """Of what shapes messages and token ids besides rows and tokenizer: this package's code, and its libraries.

    `Dataset.map` names its cache after its function and arguments, but not after the functions that those call: without
    this, rows prepared by another version of this repository or of transformers would be taken for today's.
    """
    return code_fingerprint(Path(__file__).parent, ("transformers", "tokenizers", "jinja2", "trl", "datasets"))


def unusable_pair(prompt: Messages, chosen: Messages, rejected: Messages) -> str | None:
    """Why a pair can't be trained on, None if it can."""
    if reason := unusable_prompt(prompt):
        return reason
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in response] != ["assistant"]:
            return f"{side} is not one assistant message after the prompt"
        if not response[0]["content"].strip():
            return f"{side} is empty"
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        return "chosen and rejected are identical"
    return None


def unusable_dialogue(messages: Messages) -> str | None:
    if not messages or messages[-1]["role"] != "assistant":
        return "the dialogue does not end with an assistant message"
    if not messages[-1]["content"].strip():
        return "the response is empty"
    if len(messages) == 1:  # a response without a prompt is meant: it teaches the prior log pi(y), which RMiPO reads
        return None
    return unusable_prompt(messages[:-1])


def unusable_prompt(prompt: Messages) -> str | None:
    """An empty system message is no fault: templates render it as they do."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not turns:
        return "the prompt is empty"
    roles = [message["role"] for message in turns]  # templates raise for other orders, or render them in silence
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return "roles out of order"
    if any(not message["content"].strip() for message in turns):
        return "the prompt has an empty message"
    return None


SHOWN_ROWS = 5  # numbers named per reason


@contextlib.contextmanager
def of_split(split: str) -> Iterator[None]:
    """Name the split in what is wrong with its rows."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{split}: {error}") from error


class DataReport:
    """Attributes, which `vars` gives for a record:
    rows, kept: how many.
    dropped: reason -> row numbers.
    rows_cut: rows of which any side is cut; `cut` has the number per side.
    tokens: total per side, after the cut. `lengths`: median, p95 and max tokens per side.
    """

    def __init__(
        self,
        rows: Sequence[int],
        reasons: Sequence[str | None],
        lengths: Mapping[str, np.ndarray],
        cut: Mapping[str, np.ndarray],
    ):
        """Of the numbers of all rows, the reasons to drop them or None, and per side tokens and whether they are cut."""
        kept = np.array([reason is None for reason in reasons], dtype=bool)
        self.rows, self.kept = len(kept), int(kept.sum())
        self.dropped: dict[str, list[int]] = {}
        for reason, row in zip(reasons, rows, strict=True):
            if reason is not None:
                self.dropped.setdefault(reason, []).append(row)
        # A row counts once, however many of its sides are cut.
        self.rows_cut = int(np.any([*cut.values()], axis=0)[kept].sum())
        self.cut = {side: int(values[kept].sum()) for side, values in cut.items()}
        self.tokens = {side: int(values[kept].sum()) for side, values in lengths.items()}
        self.lengths: dict[str, dict[str, int]] = {}
        for side, values in lengths.items() if self.kept else ():
            median, p95, longest = np.percentile(values[kept], (50, 95, 100))
            self.lengths[side] = {"median": int(median), "p95": int(p95), "max": int(longest)}

    def check(self, max_dropped_fraction: float, max_truncated_fraction: float) -> None:
        """Raises DataError where more is dropped or cut: a run on a tenth of its rows would look like any other."""
        dropped, problem = self.rows - self.kept, None
        if self.kept == 0 or dropped > max_dropped_fraction * self.rows:
            allowed = f"more than max_dropped_fraction: {max_dropped_fraction} allows"
            problem = f"{dropped} of {self.rows} rows can't be used, {allowed}"
        elif self.rows_cut > max_truncated_fraction * self.kept:
            allowed = f"more than max_truncated_fraction: {max_truncated_fraction} allows"
            problem = f"{self.rows_cut} of {self.kept} rows are cut to max_length or max_prompt_length, {allowed}"
        if problem:
            raise DataError("\n".join([problem, *self.lines()]))

    def lines(self) -> list[str]:
        """Short lines to print."""
        lines = [f"{self.kept} of {self.rows} rows used"]
        for reason, rows in self.dropped.items():
            numbers = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
            lines.append(f"- {len(rows)} dropped, {reason}: row {numbers}")
        if self.rows_cut:
            sides = ", ".join(f"{count} {side}" for side, count in self.cut.items())
            lines.append(f"- {self.rows_cut} rows cut ({sides}): a prompt loses its start, other texts their end")
        for side, values in self.lengths.items():
            numbers = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"{side} tokens: {self.tokens[side]:,} ({numbers})")
        return lines
