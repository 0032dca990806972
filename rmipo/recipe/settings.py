"""The blocks of an eval.yaml, and of other files whose keys have defaults: names, types and ranges."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

from rmipo.errors import EvaluationError

# Whole numbers, and the least that each can be. Where the default is null or "auto", so may the value be.
WHOLE = {
    "first_n": 1, "limit": 1, "skip_n": 0, "answers": 1, "batch_pairs": 1, "batch_size": 1, "concurrency": 1, "seed": 0,
    "max_new_tokens": 1, "max_tokens": 1, "max_length": 2, "max_prompt_length": 1, "top_k": 0, "max_retries": 0,
    "max_missing": 0,
}  # fmt: skip

RANGES = {
    "temperature": (0, 2, "0 (greedy) to 2"),
    "top_p": (1e-9, 1, "more than 0, at most 1"),
}


def merge_settings(block: str, defaults: dict, settings: dict, problems: Iterable[str] = ()) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for unknown keys, and naming every wrong value.

    `problems`: those that the caller has found.
    """
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"{block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    expected = {key: expectation(key, defaults[key], value) for key, value in settings.items()}
    found = [f"{key} is {settings[key]!r}, expected {what}" for key, what in expected.items() if what]
    if found := [*found, *problems]:
        raise EvaluationError(f"{block}: {'; '.join(found)}")
    whole = {key: int(value) for key, value in settings.items() if key in WHOLE and isinstance(value, float)}
    return defaults | settings | whole


def expectation(key: str, default: Any, value: Any) -> str | None:
    """What `value` should be; None if it is that."""
    if value == default and type(value) is type(default):
        return None
    if key in WHOLE:
        sound = type(value) in (int, float) and math.isfinite(value) and value >= WHOLE[key] and value == int(value)
        return None if sound else f"a whole number, {WHOLE[key]} or more"
    if key == "price":
        sound = isinstance(value, list) and len(value) == 2 and all(is_amount(part) for part in value)
        return None if sound else "two numbers, dollars per million tokens, such as [10.0, 30.0]"
    if key in RANGES:
        low, high, what = RANGES[key]
        return None if type(value) in (int, float) and low <= value <= high else what
    if type(default) in (int, float):
        return None if is_amount(value) else "a number, 0 or more"
    kinds = {bool: "true or false", str: "text", dict: "a block of `key: value` lines", list: "a list"}
    return None if default is None or isinstance(value, type(default)) else kinds[type(default)]


def is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def nearest(unknown: list[str], known: Iterable[str]) -> str:
    """For an error message: the known names that are like the unknown ones, then all known ones."""
    near = [name for text in unknown for name in difflib.get_close_matches(text, list(known), n=1)]
    return (f" (did you mean {', '.join(near)}?)" if near else "") + f"; it has {sorted(known)}"
