"""The blocks of an eval.yaml."""

import difflib
from collections.abc import Iterable

from rmipo.errors import EvaluationError


def merge_settings(block: str, defaults: dict, settings: dict) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for keys that the block of eval.yaml doesn't have."""
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"eval.yaml, {block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    return defaults | settings


def nearest(unknown: list[str], known: Iterable[str]) -> str:
    """For an error message: the known names that are like the unknown ones, then all known ones."""
    near = [name for text in unknown for name in difflib.get_close_matches(text, list(known), n=1)]
    return (f" (did you mean {', '.join(near)}?)" if near else "") + f"; it has {sorted(known)}"
