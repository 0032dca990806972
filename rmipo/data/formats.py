"""The formats in which preference pairs and dialogues are published, and which rows are usable.

A new format is a function that reads a row, and its line in `PAIRS` or `DIALOGUES`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trl import extract_prompt

from rmipo.data.chat import DataError, Messages

Sides = tuple[Messages, ...]
Row = dict[str, Any]

ROLES = ("system", "user", "assistant")
SIDES = ("prompt", "chosen", "rejected")
# What templates write into a prompt, and what is not passed on to them: such rows would be trained without it.
UNREAD_COLUMNS = (
    "system_prompt", "system_message", "history", "tools", "functions", "documents", "images", "chat_template_kwargs",
)  # fmt: skip
UNREAD_KEYS = (
    "tools", "functions", "tool_calls", "tool_call_id", "tool_plan", "function_call", "function_calls",
    "reasoning_content", "reasoning", "thinking", "thought", "images",
)  # fmt: skip
# Which turns to train, in OpenAI's and Axolotl's formats: TRL has no such mask, and every turn would be trained.
UNREAD_KEYS += ("weight", "train")
# What this repository writes into its own rows for people to look at.
OUR_COLUMNS = ("kind", "flipped", "prompt_id", "score_chosen", "score_rejected")
# How other templates and formats write turns. In a text they are nothing but text.
MARKERS = re.compile(
    r"(?:\A\s*|\n)(?:### ?)?(?:Human|User|Assistant|Bot|Instruction|Response):|<\|im_(?:start|end)\|>|"
    r"<\|(?:start|end)_header_id\|>|<\|(?:system|user|assistant)\|>|\[/?INST\]|<(?:start|end)_of_turn>|"
    r"\A\s*\[\s*\{\s*['\"](?:role|content)['\"]"
)


class Format(NamedTuple):
    """`read` turns a row with these `columns` into messages, one list per side; None if it is of another format."""

    columns: tuple[str, ...]
    read: Callable[[Row], Sides | None]


def read_shared_turns(row: Row) -> Sides | None:
    chosen = read_turns(row["chosen"], "assistant", "chosen")
    rejected = read_turns(row["rejected"], "assistant", "rejected")
    if not is_dialogue(chosen) or not is_dialogue(rejected):
        return None
    # TRL's rule of what two dialogues share, so that the same file gives the same pairs there and here.
    prompt, chosen, rejected = (extract_prompt({"chosen": chosen, "rejected": rejected})[side] for side in SIDES)
    # As text it may be anything: UltraFeedback repeats the first user turn there.
    if isinstance(row.get("prompt"), list):
        own = read_turns(row["prompt"], "user", "prompt")
        if prompt[: len(own)] != own:
            raise DataError("`prompt` differs from the turns that `chosen` and `rejected` share: keep one of them")
    return prompt, chosen, rejected


def read_prompt_and_responses(row: Row) -> Sides | None:
    if row["prompt"] is None:
        return None
    sides = zip(SIDES, ("user", "assistant", "assistant"), strict=True)
    return tuple(read_turns(row[side], role, side) for side, role in sides)


def read_prompt(row: Row) -> Sides | None:
    return None if row["prompt"] is None else (read_turns(row["prompt"], "user", "prompt"),)


def read_prompt_of_messages(row: Row) -> Sides | None:
    messages = read_turns(row["messages"], "user", "messages")
    return (messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages,)


def read_messages(row: Row) -> Sides | None:
    return read_turns(row["messages"], "user", "messages"), []


def read_prompt_and_completion(row: Row) -> Sides | None:
    prompt = read_turns(row["prompt"], "user", "prompt")
    completion = read_turns(row["completion"], "assistant", "completion")
    return prompt + completion, completion


# In the order in which they are tried.
PAIRS = (
    Format(("chosen", "rejected"), read_shared_turns),  # dialogues, UltraFeedback-binarized's or Anthropic-HH texts
    Format(("prompt", "chosen", "rejected"), read_prompt_and_responses),
)
DIALOGUES = (
    Format(("messages",), read_messages),
    Format(("prompt", "completion"), read_prompt_and_completion),
)
PROMPTS = (
    Format(("prompt",), read_prompt),
    Format(("messages",), read_prompt_of_messages),
)


def missing_columns(columns: Sequence[str], formats: Sequence[Format]) -> list[str]:
    """What the nearest of `formats` has and `columns` have not; empty if one of them can be read."""
    return min(([name for name in f.columns if name not in columns] for f in formats), key=len)


def read_row(row: Row, formats: Sequence[Format]) -> Sides:
    """The messages of a row, by the first of `formats` that it is of. Raises DataError with what is wrong."""
    for name in UNREAD_COLUMNS:
        if row.get(name):
            raise DataError(f"`{name}` is part of the prompt, but is not supported: remove the column, or render it")
    for form in formats:
        if all(name in row for name in form.columns) and (sides := form.read(row)) is not None:
            return with_system(row.get("system"), sides)
    lacking = ([name for name in form.columns if row.get(name) is None] for form in formats)
    missing = min(filter(None, lacking), key=len, default=[])  # of the nearest format
    raise DataError(f"no {' or '.join(missing)}, and the other columns match no accepted format")


def with_system(text: Any, sides: Sides) -> Sides:
    """The sides with the text of a column `system` in front of the first."""
    if not text:
        return sides
    first = sides[0]
    if not isinstance(text, str):
        raise DataError(f"`system` is {type(text).__name__}, expected text")
    if first and first[0]["role"] == "system" and first[0]["content"] != text:
        raise DataError("`system` differs from the system message of the row: keep one of them")
    rest = first[1:] if first and first[0]["role"] == "system" else first  # the column repeats it
    return ([{"role": "system", "content": text}, *rest], *sides[1:])


def read_turns(value: Any, role: str, column: str) -> Messages:
    """Messages of a cell: a list of messages, an Anthropic-HH text, or a text spoken by `role`. None is empty text."""
    if value is None or isinstance(value, str):  # an empty text is dropped later, with its reason
        # Marks count after a blank line, and only where the text starts with one: "Human:" may also be quoted.
        turns = re.split(r"\n\n(Human|Assistant):", value or "")
        if turns[0].strip() == "" and len(turns) > 1:
            return read_hh(turns, open_end=column == "prompt")
        return [{"role": role, "content": value or ""}]
    if not isinstance(value, list):
        raise DataError(f"`{column}` is {type(value).__name__}, expected messages or text")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise DataError(f"`{column}` holds {found}, expected messages with role and content")
        if message["role"] not in ROLES:
            raise DataError(f"`{column}` has the role {message['role']!r}, expected {', '.join(ROLES)}")
        if not isinstance(message["content"], str | None):
            raise DataError(f"`{column}` has content of type {type(message['content']).__name__}, expected text")
        if unread := [key for key in UNREAD_KEYS if message.get(key) not in (None, "", [], {})]:
            raise DataError(
                f"`{column}` has messages with {', '.join(unread)}: not supported, put it into content or remove the key"
            )
        messages.append({"role": message["role"], "content": message["content"] or ""})
    return messages


def read_hh(turns: list[str], open_end: bool) -> Messages:
    """Anthropic-HH text, split at its speaker marks; the text after the last "Assistant:" is the response.

    A prompt column may end in an open "Assistant:", which is not a turn.
    """
    roles = {"Human": "user", "Assistant": "assistant"}
    speakers, texts = turns[1::2], turns[2::2]
    messages = [{"role": roles[s], "content": text.strip()} for s, text in zip(speakers, texts, strict=True)]
    if open_end and messages[-1] == {"role": "assistant", "content": ""}:
        # Generation would have to continue it.
        messages.pop()
    return messages


def has_markers(messages: Messages) -> bool:
    return any(MARKERS.search(message["content"]) for message in messages)


def is_dialogue(messages: Messages) -> bool:
    return bool(messages) and messages[0]["role"] != "assistant"


def unusable_pair(prompt: Messages, chosen: Messages, rejected: Messages) -> str | None:
    """Why a pair can't be trained on, None if it can."""
    if reason := unusable_prompt(prompt):
        return reason
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if len(response) > 1:
            return f"{side} is {len(response)} messages after the shared prompt, not one"
        if not response or not response[0]["content"].strip():
            return f"{side} is empty"
        if response[0]["role"] != "assistant":
            return f"{side} is a {response[0]['role']} message"
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
