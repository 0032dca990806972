"""What results were made with: whether they may stand side by side, and whether beside the paper's."""

import json
from collections import defaultdict
from collections.abc import Iterable

from rmipo.evaluation import BENCHMARKS
from rmipo.reporting.results import ReportError, Result, model_label, paper_table

ABSENT = "absent"
TRIAL = "TRIAL, not the benchmark itself"


def require_comparable(what: str, results: Iterable[Result]) -> None:
    """Raises ReportError if `results` were made by different packages, by different judges or in different ways."""
    if found := conflicts(results):
        raise ReportError("\n  ".join([f"{what}: these results aren't comparable, evaluate some again:", *found]))


def conflicts(results: Iterable[Result]) -> list[str]:
    """What differs between results of one benchmark, or of one benchmark and model, and mustn't: with a file for each."""
    # Judge, versions and prompts must agree in all of a table; decoding is the model's, as in the paper.
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.bench, ""].append(result)
        groups[result.bench, result.model].append(result)
    found = []
    for (bench, model), group in groups.items():
        benchmark = BENCHMARKS[bench]
        packages = sorted({f"versions.{package}" for result in group for package in result.versions})
        for name in benchmark.same_per_model if model else (*packages, *benchmark.same):
            files = {value_of(result, name): result.path for result in group}
            if name in benchmark.optional:
                files.pop(ABSENT, None)
            if len(files) > 1:
                listing = "; ".join(f"{value} in {path}" for value, path in files.items())
                found.append(f"{bench} {model}".strip() + f": {name} {listing}")
    return found


def value_of(result: Result, name: str) -> str:
    """A setting with dots, or `versions.<package>`, as text."""
    value = {**result.settings, "versions": result.versions}
    for key in name.split("."):
        value = (value or {}).get(key)
    return ABSENT if value is None else as_text(value)


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def made_with(results: Iterable[Result]) -> list[str]:
    """Judge, decoding, versions, number of prompts and commit behind `results`: a line for each different way."""
    lines = []
    for result in results:
        benchmark = BENCHMARKS[result.bench]
        facts = {name: value_of(result, name) for name in (*benchmark.same, *benchmark.same_per_model)}
        # How many prompts a number is a mean of.
        counts = sorted({sum(value is not None for value in values) for values in result.per_prompt.values()})
        facts |= {"n": " and ".join(map(str, counts)) or ABSENT, **result.versions, "commit": result.commit or ABSENT}
        made = ", ".join(f"{name} {value}" for name, value in facts.items() if value != ABSENT)
        lines.append(f"{benchmark.title} of {model_label(result.model)}: {made}.")
    return list(dict.fromkeys(lines))


def deviations(result: Result) -> list[str]:
    """Why the result can't stand beside the paper's: it is a trial, or another judge or decoding was used."""
    benchmark = BENCHMARKS[result.bench]
    usual = {name: as_text(benchmark.defaults.get(name)) for name in benchmark.trial}
    trial = [f"{name}={value}" for name in usual if (value := value_of(result, name)) not in (ABSENT, usual[name])]
    found = [f"{TRIAL}: {benchmark.title} with {', '.join(trial)}."] if trial else []
    # The paper has one judge, and a decoding for each of its models; others have none to differ from.
    paper = dict(benchmark.paper)
    decoding = paper_table("decoding").query("setting == @result.model").drop(columns="setting").to_dict("records")
    for key, value in (decoding or [{}])[0].items():
        if (name := f"generation.{key}") in benchmark.same_per_model:
            paper[name] = value
    for name, expected in ((name, as_text(value)) for name, value in paper.items()):
        if (value := value_of(result, name)) != expected:
            of = f"{benchmark.title} of {model_label(result.model)}"
            found.append(f"{of}: {name} is {value}, the paper's is {expected}.")
    return found


def figure_notes(results: Iterable[Result]) -> list[str]:
    """What has to be said under a figure: how its results were made and in what unlike the paper's."""
    results = list(results)
    unlike = dict.fromkeys(text for result in results for text in deviations(result))
    return [*unlike, *made_with(results)]
