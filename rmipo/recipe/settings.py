"""The blocks of an eval.yaml, and of other files whose keys have defaults: names, types and ranges."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rmipo.errors import EvaluationError
from rmipo.recipe.files import nearest, typed

# Types of keys whose default does not say all. Where the default is null or "auto", so may the value be.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("first_n", "limit", "answers", "batch_size", "concurrency"), PositiveInt),
    **dict.fromkeys(("max_new_tokens", "max_prompt_length"), PositiveInt),
    **dict.fromkeys(("skip_n", "seed", "top_k", "max_missing"), NonNegativeInt),
    "max_length": Annotated[int, Field(ge=2)],
    "temperature": Annotated[float, Field(ge=0, le=2)],
    "top_p": Annotated[float, Field(gt=0, le=1)],
    "engine": Literal["auto", "transformers", "vllm"],
    "dtype": Literal["auto", "bfloat16", "float16", "float32"],
    # What lm-eval takes in place of a whole number.
    "leaderboard.batch_size": PositiveInt | Annotated[str, Field(pattern=r"^auto:[1-9]\d*$")],
    "leaderboard.limit": PositiveInt | Annotated[float, Field(gt=0, lt=1)],
}


def merge_settings(block: str, defaults: dict, settings: dict) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for unknown keys, and naming every wrong value."""
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"{block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    merged, problems = dict(defaults), []
    for key, value in settings.items():
        default = defaults[key]
        of_default = NonNegativeFloat if type(default) in (int, float) else Any if default is None else type(default)
        try:
            kind = TYPES.get(f"{block}.{key}", TYPES.get(key, of_default))
            merged[key] = value if value == default else typed(kind, value, f"{block}: {key}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise EvaluationError("\n  ".join(problems))
    return merged
