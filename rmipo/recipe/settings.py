"""The blocks of an eval.yaml."""

from rmipo.errors import EvaluationError


def merge_settings(block: str, defaults: dict, settings: dict) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for keys that the block of eval.yaml doesn't have."""
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        raise EvaluationError(f"eval.yaml, {block}: unknown keys {unknown}; it has {sorted(defaults)}")
    return defaults | settings
