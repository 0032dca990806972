"""The blocks of an eval.yaml, and of other files whose keys have defaults: names, types and ranges."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rmipo.errors import EvaluationError
from rmipo.recipe.files import coerce

# Types of keys whose default does not say all. Where the default is null or "auto", so may the value be.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("first_n", "limit", "answers", "batch_size", "concurrency"), PositiveInt),
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_prompt_length"), PositiveInt),
    **dict.fromkeys(("skip_n", "seed", "top_k", "max_retries", "max_missing"), NonNegativeInt),
    "max_length": Annotated[int, Field(ge=2)],
    "temperature": Annotated[float, Field(ge=0, le=2)],
    "top_p": Annotated[float, Field(gt=0, le=1)],
    "dtype": Literal["auto", "bfloat16", "float16", "float32"],
    "price": Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)],  # per million tokens
    # What lm-eval takes in place of a whole number.
    "leaderboard.batch_size": PositiveInt | Annotated[str, Field(pattern=r"^auto:[1-9]\d*$")],
    "leaderboard.limit": PositiveInt | Annotated[float, Field(gt=0, lt=1)],
}


def merge_settings(block: str, defaults: dict, settings: dict, problems: Iterable[str] = ()) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for unknown keys, and naming every wrong value.

    `problems`: those that the caller has found.
    """
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"{block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    sound, found = {}, []
    for key, value in settings.items():
        try:
            sound[key] = checked(block, key, defaults[key], value)
        except ValueError as error:
            found.append(f"{key} is {value!r}: {error}")
    if found := [*found, *problems]:
        raise EvaluationError(f"{block}: {'; '.join(found)}")
    return defaults | sound


def checked(block: str, key: str, default: Any, value: Any) -> Any:
    """`value` in the type of `default`. Raises ValueError that says what was expected."""
    # A default need not pass the checks: null and "auto" have types of their own.
    if type(value) is type(default) and value == default:
        return value
    kind = TYPES.get(f"{block}.{key}", TYPES.get(key))
    if kind is None and default is None:
        return value
    return coerce(value, kind or (NonNegativeFloat if type(default) in (int, float) else type(default)))


def nearest(unknown: list[str], known: Iterable[str]) -> str:
    """For an error message: the known names that are like the unknown ones, then all known ones."""
    near = [name for text in unknown for name in difflib.get_close_matches(text, list(known), n=1)]
    return (f" (did you mean {', '.join(near)}?)" if near else "") + f"; it has {sorted(known)}"
