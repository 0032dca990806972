"""What results were made with: whether they may stand side by side, and whether beside the paper's."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

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
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.bench, ""].append(result)
        groups[result.bench, result.model].append(result)
    # By benchmark, and within it by model. Judge, versions and prompts must agree in all of a table; decoding is the
    # model's, as in the paper.
    found = []
    for (bench, model), group in sorted(groups.items()):
        benchmark = BENCHMARKS[bench]
        packages = sorted({f"versions.{package}" for result in group for package in result.versions})
        for name in benchmark.same_per_model if model else (*packages, *benchmark.same):
            files: dict[str, list[Path]] = defaultdict(list)
            for result in group:
                value = value_of(result, name)
                if value != ABSENT or name not in benchmark.optional:
                    files[value].append(result.path)
            if len(files) > 1:
                listing = "; ".join(f"{value} in {paths[0]} ({len(paths)} files)" for value, paths in files.items())
                found.append(f"{bench}{of([model])}: {name.removeprefix('versions.')} {listing}")
    return found


def value_of(result: Result, name: str) -> str:
    """`versions.<package>` of the result, or a setting with dots, as text."""
    block, _, package = name.partition(".")
    if block == "versions":
        return result.versions.get(package, ABSENT)
    value = result.settings
    for key in name.split("."):
        value = (value or {}).get(key)
    return ABSENT if value is None else as_text(value)


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def of(models: Iterable[str]) -> str:
    named = ", ".join(filter(None, models))
    return f" of {named}" if named else ""


def made_with(results: Iterable[Result]) -> list[str]:
    """Judge, decoding, versions, prompts and commits behind `results`: a line for each different way, models named."""
    models: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # (benchmark, what) -> ordered set
    commits: dict[str, None] = {}
    for result in results:
        benchmark = BENCHMARKS[result.bench]
        # How many prompts a number is a mean of.
        counts = sorted({sum(value is not None for value in values) for values in result.per_prompt.values()})
        versions = [f"{package} {version}" for package, version in sorted(result.versions.items())]
        shared = [
            named(result, benchmark.same),
            "n " * bool(counts) + " and ".join(map(str, counts)),
            ", ".join(versions),
        ]
        models[benchmark.title, "; ".join(filter(None, shared))][""] = None
        models[benchmark.title, named(result, benchmark.same_per_model)][model_label(result.model)] = None
        if result.commit:  # twelve digits tell commits apart; whether files were modified has to stay visible
            commit, _, modified = result.commit.partition("+")
            commits[commit[:12] + f"+{modified}" * bool(modified)] = None
    lines = [f"{title}{of(names)}: {text}." for (title, text), names in models.items() if text]
    return lines + ([f"Evaluated at commit {', '.join(commits)}."] if commits else [])


def named(result: Result, names: Iterable[str]) -> str:
    """The settings of these names that the result has."""
    return ", ".join(f"{name} {value}" for name in names if (value := value_of(result, name)) != ABSENT)


def deviations(result: Result) -> list[str]:
    """Why the result can't stand beside the paper's: it is a trial, or another judge or decoding was used."""
    benchmark = BENCHMARKS[result.bench]
    usual = {name: as_text(benchmark.defaults.get(name)) for name in benchmark.trial}
    trial = [f"{name}={value}" for name in usual if (value := value_of(result, name)) not in (ABSENT, usual[name])]
    found = [f"{TRIAL}: {benchmark.title} with {', '.join(trial)}."] if trial else []
    # The paper has one judge, and a decoding for each of its models; others have none to differ from.
    paper = {name: as_text(value) for name, value in benchmark.paper.items()}
    decoding = paper_table("decoding").astype(str).set_index("setting")
    if result.model in decoding.index:
        own = {f"generation.{key}": value for key, value in decoding.loc[result.model].items()}
        paper |= {name: value for name, value in own.items() if name in benchmark.same_per_model}
    for name, expected in paper.items():
        if (value := value_of(result, name)) != expected:
            model = of([model_label(result.model)] if name in benchmark.same_per_model else [])
            found.append(f"{benchmark.title}{model}: {name} is {value}, the paper's is {expected}.")
    return found


def missing_verdicts(results: Iterable[Result]) -> list[str]:
    """A line with the verdicts that the numbers leave out, e.g. "7 in tiny/rmipo/eval/mtbench.json"; [] without any."""
    found = {
        f"{count:g} in {'/'.join(result.path.parts[-4:])}": None
        for result in results
        for name, count in result.metrics.items()
        if name.endswith("_missing") and count > 0
    }
    return [f"MISSING verdicts: {'; '.join(found)}."] if found else []


def figure_notes(results: Iterable[Result]) -> list[str]:
    """What has to be said under a figure of these results: how they were made, in what unlike the paper's, what lacks."""
    results = list(results)
    unlike = dict.fromkeys(text for result in results for text in deviations(result))
    return [*made_with(results), *unlike, *missing_verdicts(results)]
