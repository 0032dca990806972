"""Thin adapters to the field's evaluation packages.

Each benchmark is a module with `run(model_dir, output_dir, settings) -> {"metrics", "versions", "settings"}`, where
`settings` is its block of recipes/<model>/eval.yaml. The packages are in the extra `eval`.
"""

import importlib.metadata
import os
from urllib.parse import urlsplit


class EvaluationError(ValueError):
    """An evaluation that can't start or was cut short; the message says what to change and what was kept."""


def merge_settings(block: str, defaults: dict, settings: dict) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for keys that the block of eval.yaml doesn't have."""
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        raise EvaluationError(f"eval.yaml, {block}: unknown keys {unknown}; it has {sorted(defaults)}")
    return defaults | settings


def package_versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def judge_endpoint() -> tuple[str, str]:
    """(URL, the part of it that may be shown) of the judge, from OPENAI_BASE_URL; the key is read by the packages.

    Raises EvaluationError without OPENAI_API_KEY or with something that isn't a URL.
    """
    url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    parts = urlsplit(url)
    problems = []
    if not os.environ.get("OPENAI_API_KEY"):
        problems.append("the judge needs OPENAI_API_KEY in the environment (any text for a server that asks for none)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problems.append("OPENAI_BASE_URL is not a URL such as http://127.0.0.1:8000/v1")
    if problems:
        raise EvaluationError("; ".join(problems))
    shown = parts.hostname + (f":{parts.port}" if parts.port else "") + parts.path
    return url, shown


def check_cost(what: str, calls: int, input_tokens: float, output_tokens: float, settings: dict) -> None:
    """Print what `calls` requests to the judge will cost, before the first of them.

    Args:
        settings: `price`, US dollars per million input and output tokens; `max_cost`, dollars.

    Raises EvaluationError if that is more than `max_cost`.
    """
    price_in, price_out = settings["price"]
    cost = (input_tokens * price_in + output_tokens * price_out) / 1e6
    print(
        f"{what}: {calls} verdicts to ask for, about {input_tokens / 1e3:.0f}k + {output_tokens / 1e3:.0f}k tokens,"
        f" ${cost:.2f} at ${price_in} and ${price_out} per million (max_cost ${settings['max_cost']})",
        flush=True,
    )
    if cost > settings["max_cost"]:
        raise EvaluationError(
            f"{what}: the judge would cost about ${cost:.2f}, more than max_cost {settings['max_cost']}; nothing was "
            "asked. Raise it (--max_cost, or max_cost in eval.yaml), or choose another judge and its price."
        )
