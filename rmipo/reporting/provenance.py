"""Whether results may stand side by side: what each was made with, and what differs between them."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rmipo.reporting.results import ReportError, Result

HH_SETS = ("helpful", "harmless")
HH_PAIRS = tuple(f"pairs_sha256.{name}" for name in HH_SETS)
# Besides package versions. Dots lead into a block of the result's settings.
SAME_IN_A_BENCH = {
    "alpacaeval": ("annotators_config", "judge_sha256", "judge_endpoint", "reference_sha256", "first_n"),
    "mtbench": (
        "judge_model",
        "judge_reference_model",
        "judge_endpoint",
        "temperatures",
        "max_new_tokens",
        "first_n",
    ),
    "leaderboard": ("tasks", "include_path", "apply_chat_template", "fewshot_as_multiturn", "dtype", "limit"),
    "hh": (*HH_SETS, *HH_PAIRS, "max_length", "max_prompt_length", "dtype"),
}
# The paper samples each model in its own way, and all methods of a model alike.
SAME_IN_A_MODEL = {
    "alpacaeval": tuple(f"generation.{key}" for key in ("temperature", "top_p", "max_new_tokens", "dtype")),
    "mtbench": ("generation.top_p", "generation.dtype"),  # its temperatures and length are the benchmark's
}
MAY_BE_LEFT_OUT = HH_SETS + HH_PAIRS  # an HH evaluation of one subset doesn't contradict one of both
TRIAL_SETTINGS = ("limit", "first_n", "include_path", "reference")  # make another benchmark of it, or a part
ABSENT = "absent"


@dataclass(frozen=True)
class Conflict:
    """One package or setting that differs between the result files `paths`; `text` names a file for each value."""

    text: str
    paths: frozenset[Path]


def conflicts(results: Iterable[Result]) -> list[Conflict]:
    """What differs between results of one benchmark, or of one benchmark and model, and mustn't."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.bench, ""].append(result)
        groups[result.bench, result.model].append(result)
    found = []
    for (bench, model), group in sorted(groups.items()):
        if model:
            title, names = f"{bench} of {model}", SAME_IN_A_MODEL.get(bench, ())
        else:
            packages = {f"versions.{package}" for result in group for package in result.versions}
            title, names = bench, (*sorted(packages), *SAME_IN_A_BENCH[bench])
        for name in names:
            files: dict[str, list[Path]] = defaultdict(list)
            for result in group:
                value = value_of(result, name)
                if value != ABSENT or name not in MAY_BE_LEFT_OUT:
                    files[value].append(result.path)
            if len(files) > 1:
                listing = "; ".join(f"{value} in {paths[0]} ({len(paths)} files)" for value, paths in files.items())
                paths = frozenset(path for paths in files.values() for path in paths)
                found.append(Conflict(f"{title}: {name.removeprefix('versions.')} {listing}", paths))
    return found


def value_of(result: Result, name: str) -> str:
    """`name` of the result as text: `versions.<package>`, or a setting with dots; "absent" without a value."""
    block, _, package = name.partition(".")
    if block == "versions":
        return result.versions.get(package, ABSENT)
    value = result.settings
    for key in name.split("."):
        value = (value or {}).get(key)
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def require_comparable(what: str, results: Iterable[Result]) -> None:
    """Raises ReportError if `results` were made by different packages, by different judges or in different ways."""
    if found := conflicts(results):
        listing = "\n  ".join(conflict.text for conflict in found)
        raise ReportError(
            f"{what}: result files of mixed versions or settings aren't comparable:\n  {listing}\nDelete those that are "
            "wrong and evaluate these runs again."
        )


def reservations(result: Result) -> list[str]:
    """What has to be said beside each number of a result: that it is a trial, or lacks verdicts."""
    trial = [
        f"TRIAL, not the benchmark itself: {result.path} was made with {key}={result.settings[key]}."
        for key in TRIAL_SETTINGS
        if result.settings.get(key) is not None
    ]
    missing = [
        f"MISSING: {result.path}, {count:g} verdicts."
        for name, count in result.metrics.items()
        if name.endswith("_missing") and count > 0
    ]
    return trial + missing
