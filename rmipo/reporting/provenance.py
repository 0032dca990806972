"""Whether results may stand side by side: what each was made with, and what differs between them."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rmipo.evaluation import BENCHMARKS
from rmipo.reporting.results import ReportError, Result

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
            title, names = f"{bench} of {model}", BENCHMARKS[bench].same_per_model
        else:
            packages = {f"versions.{package}" for result in group for package in result.versions}
            title, names = bench, (*sorted(packages), *BENCHMARKS[bench].same)
        for name in names:
            files: dict[str, list[Path]] = defaultdict(list)
            for result in group:
                value = value_of(result, name)
                if value != ABSENT or name not in BENCHMARKS[bench].optional:
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
        for key in BENCHMARKS[result.bench].trial
        if result.settings.get(key) is not None
    ]
    missing = [
        f"MISSING: {result.path}, {count:g} verdicts."
        for name, count in result.metrics.items()
        if name.endswith("_missing") and count > 0
    ]
    return trial + missing
