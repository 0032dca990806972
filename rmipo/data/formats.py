"""The forms in which preference pairs and dialogues are published, read into messages; which of them are usable."""

import re

from trl import extract_prompt

from rmipo.data.chat import DataError, Messages

ROLES = ("system", "user", "assistant")
SIDES = ("prompt", "chosen", "rejected")
PAIR_FORMS = """Accepted forms:
- `prompt`, `chosen`, `rejected`: the prompt a text or messages, the responses texts or one assistant message each
- `chosen`, `rejected`: full dialogues as messages whose shared turns are the prompt (UltraFeedback-binarized)
- `chosen`, `rejected`: Anthropic-HH texts "\\n\\nHuman: ...\\n\\nAssistant: ..."
Messages are lists of {"role": "system" | "user" | "assistant", "content": text}. Rename the columns of your data."""
DIALOGUE_FORMS = """Accepted forms:
- `messages`: a dialogue that ends with an assistant message
- `prompt`, `completion`: texts or messages
Messages are lists of {"role": "system" | "user" | "assistant", "content": text}. Rename the columns of your data."""


def read_pair(row: dict) -> tuple[Messages, Messages, Messages]:
    """Bring a row of any accepted form to (prompt, chosen, rejected). Raises DataError with what is wrong."""
    chosen = read_turns(row["chosen"], "assistant", "chosen")
    rejected = read_turns(row["rejected"], "assistant", "rejected")
    if is_dialogue(chosen) and is_dialogue(rejected):
        return tuple(extract_prompt({"chosen": chosen, "rejected": rejected})[side] for side in SIDES)
    if row.get("prompt") is None:
        raise DataError("no prompt: there is no `prompt` column and `chosen`, `rejected` are not both full dialogues")
    return read_turns(row["prompt"], "user", "prompt"), chosen, rejected


def read_dialogue(row: dict) -> tuple[Messages]:
    if "messages" in row:
        return (read_turns(row["messages"], "user", "messages"),)
    return (read_turns(row["prompt"], "user", "prompt") + read_turns(row["completion"], "assistant", "completion"),)


def read_turns(value, role: str, column: str) -> Messages:
    """Messages of a cell: a list of messages, an Anthropic-HH text, or a text spoken by `role`. None is empty text."""
    if value is None or isinstance(value, str):
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
        messages.pop()
    return messages


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
    if len(messages) == 1:  # a response alone teaches its prior, log pi(y)
        return None
    return unusable_prompt(messages[:-1])


def unusable_prompt(prompt: Messages) -> str | None:
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not turns:
        return "the prompt is empty (chosen and rejected share no turns)"
    previous = "assistant"
    for message in turns:
        if message["role"] == previous or message["role"] == "system":
            where = f"{message['role']} after {previous}" if message is not turns[0] else f"{message['role']} first"
            return f"roles out of order: {where}"
        previous = message["role"]
    if previous != "user":
        return "roles out of order: the prompt does not end with a user message"
    if any(not message["content"].strip() for message in prompt):
        return "the prompt has an empty message"
    return None
