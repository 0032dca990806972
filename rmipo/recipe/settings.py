"""The blocks of an eval.yaml, and of other files whose keys have defaults: names, types and ranges."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from rmipo.errors import EvaluationError
from rmipo.recipe.files import coerce

# Whole numbers, and the least that each can be. Where the default is null or "auto", so may the value be.
WHOLE = {
    "first_n": 1, "limit": 1, "skip_n": 0, "answers": 1, "batch_size": 1, "concurrency": 1, "seed": 0,
    "max_new_tokens": 1, "max_tokens": 1, "max_length": 2, "max_prompt_length": 1, "top_k": 0, "max_retries": 0,
    "max_missing": 0,
}  # fmt: skip
# What lm-eval takes in place of a whole number.
LM_EVALS = {
    "leaderboard.batch_size": ("auto:4", lambda value: re.fullmatch(r"auto:[1-9]\d*", str(value))),
    "leaderboard.limit": (
        "a share, more than 0 and less than 1",
        lambda value: isinstance(value, float) and 0 < value < 1,
    ),
}
RANGES = {
    "temperature": (0, 2, "0 (greedy) to 2"),
    "top_p": (1e-9, 1, "more than 0, at most 1"),
}
DTYPES = ("auto", "bfloat16", "float16", "float32")


def merge_settings(block: str, defaults: dict, settings: dict, problems: Iterable[str] = ()) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for unknown keys, and naming every wrong value.

    `problems`: those that the caller has found.
    """
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"{block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    found, sound = [], {}
    for key, value in settings.items():
        try:
            sound[key] = checked(block, key, defaults[key], value)
        except ValueError as error:
            found.append(f"{key} is {value!r}, {error}")
    if found := [*found, *problems]:
        raise EvaluationError(f"{block}: {'; '.join(found)}")
    return defaults | sound


def checked(block: str, key: str, default: Any, value: Any) -> Any:
    """`value` in the type of `default`. Raises ValueError that says what was expected."""
    if type(value) is type(default) and value == default:
        return value
    if key == "dtype" and value not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    other, fits = LM_EVALS.get(f"{block}.{key}", ("", lambda value: False))
    if fits(value):
        return value
    low, high = 0, math.inf
    if key in WHOLE:
        kind, low, what = int, WHOLE[key], f"a whole number, {WHOLE[key]} or more{other and f', or {other}'}"
    elif key in RANGES:
        kind, (low, high, what) = float, RANGES[key]
    elif key == "price":
        kind, what = list[float], "two numbers, dollars per million tokens, such as [10.0, 30.0]"
    elif type(default) in (int, float):
        kind, what = float, "a number, 0 or more"
    else:
        return value if default is None else coerce(value, type(default))
    try:
        typed = coerce(value, kind)
    except ValueError as error:
        raise ValueError(f"expected {what}") from error
    numbers = typed if key == "price" else [typed]
    if not all(low <= number <= high for number in numbers) or (key == "price" and len(numbers) != 2):
        raise ValueError(f"expected {what}")
    return typed


def nearest(unknown: list[str], known: Iterable[str]) -> str:
    """For an error message: the known names that are like the unknown ones, then all known ones."""
    near = [name for text in unknown for name in difflib.get_close_matches(text, list(known), n=1)]
    return (f" (did you mean {', '.join(near)}?)" if near else "") + f"; it has {sorted(known)}"
