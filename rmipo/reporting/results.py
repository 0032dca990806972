"""What runs and evaluations left behind, which of it may stand side by side, and the paper's own numbers.

outputs/<model>/<method>/run.json, metrics.jsonl      a training run
outputs/<model>/<method>/eval/<bench>.json            an evaluation of it
rmipo/reporting/paper/*.csv                           the paper's tables, copied digit for digit
"""

import glob
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from rmipo.errors import UserError
from rmipo.evaluation import BENCHMARKS
from rmipo.fingerprints import has_weights, json_fingerprint, trained_fingerprint
from rmipo.launch.choices import known_settings
from rmipo.record import WITHOUT_EFFECT, recorded_run

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER_MODELS = {
    "mistral-7b-base": "Mistral-7B-Base",
    "mistral-7b-instruct": "Mistral-7B-Instruct",
    "llama3-8b-base": "Llama3-8B-Base",
    "llama3-8b-instruct": "Llama3-8B-Instruct",
}
# In the order of the paper's tables.
METHODS = {
    "initial": "Initial", "dpo": "DPO", "slic": "SLiC", "ipo": "IPO", "kto": "KTO", "cpo": "CPO", "simpo": "SimPO",
    "alpha-dpo": "α-DPO", "beta-dpo": "β-DPO", "epsilon-dpo": "ε-DPO", "simper": "SimPER", "rmipo": "RMiPO",
}  # fmt: skip
OURS = "rmipo"
ABSENT = "absent"
TRIAL = "TRIAL, not the benchmark itself"
# Keys of a recipe in which repetitions of one run may differ.
REPEATED = {"seed", "data_seed", "output_dir", "logging_steps", "save_steps"}
REPEATED |= {key.removeprefix("recipe.") for key in WITHOUT_EFFECT}


class ReportError(UserError):
    """A result file or run folder that can't be used; the message says which and what to do."""


def check_model(outputs: Path, model: str) -> None:
    """Raises ReportError unless `model` is a setting, or has a folder in `outputs`."""
    if not ((RECIPES / model / "rmipo.yaml").is_file() or (outputs / model).is_dir()):
        raise ReportError(f"MODEL={model} is neither in {outputs} nor a setting; these are {known_settings()}")


@dataclass(frozen=True)
class Result:
    """One finished evaluation. `metrics` in percent, MT-Bench in points of 10.

    Of some metrics `per_prompt` has the value of each prompt, of others `draws` has the values of resampled prompts.
    """

    path: Path
    model: str
    bench: str
    metrics: dict[str, float]
    versions: dict[str, str]
    settings: dict
    per_prompt: dict[str, list[float | None]] = field(default_factory=dict)
    draws: dict[str, list[float]] = field(default_factory=dict)
    commit: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """One training run's folder; `record` is its run.json."""

    folder: Path
    record: dict

    @property
    def objective(self) -> dict:
        """Name and hyperparameters of a preference run; {} for the SFT stage."""
        return self.record.get("objective", {})

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished"))

    @property
    def seed(self) -> int | None:
        return self.record.get("recipe", {}).get("seed")

    def experiment(self) -> dict:
        """Recipe, objective and data without the seed and what has no effect: equal for repetitions of one run."""
        # Data are compared by content: a folder that was moved is no other data.
        recipe = {name: value for name, value in self.record.get("recipe", {}).items() if name not in REPEATED}
        return {**recipe, "objective": self.objective, "data": self.record.get("fingerprints")}


def load_run(outputs: Path, model: str, method: str) -> RunFolder | None:
    """The run folder of one training, or None if it isn't there."""
    record = recorded_run(outputs / model / method)
    return RunFolder(outputs / model / method, record) if record else None


def finished_run(outputs: Path, model: str, method: str) -> RunFolder:
    """As `load_run`. Raises ReportError for a run that isn't there or hasn't finished."""
    run = load_run(outputs, model, method)
    if run is None or not run.finished:
        command = train_command(model, method)
        raise ReportError(f"{outputs / model / method} holds no finished run: run `{command}`")
    return run


def load_result(outputs: Path, model: str, method: str, bench: str, name: str = "") -> Result | None:
    """The finished result of one benchmark of a run, or None. `name`: EVAL_NAME of the evaluation.

    Raises ReportError for a result of other weights than the run's folder holds now.
    """
    folder = outputs / model / method
    path = folder / "eval" / name / f"{bench}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    if not content.get("finished"):
        return None
    # Results may be copied to another machine without the weights.
    if has_weights(folder) and content.get("fingerprint") != trained_fingerprint(folder):
        command = eval_command(model, method, bench, name)
        raise ReportError(f"{path} is of other weights than {folder} now: delete it, and run `{command}`")
    fields = ("metrics", "versions", "settings", "per_prompt", "draws", "commit")
    return Result(path, model, bench, **{key: content[key] for key in fields if key in content})


def load_results(
    outputs: Path, model: str, bench: str, name: str = "", wanted: Collection[str] | None = None
) -> dict[str, list[Result]]:
    """Run folder -> its own result, then those of its repetitions with other seeds. The paper's methods come first.

    `wanted`: folders to read, with their repetitions; None for all. A result that nobody asks for may be of other weights.
    """
    order = {method: place for place, method in enumerate(METHODS)}
    paths = glob.glob(os.path.join("**/eval", name, f"{bench}.json"), root_dir=outputs / model, recursive=True)
    methods = [Path(path).parents[2 if name else 1].as_posix() for path in paths]
    methods.sort(key=lambda method: (order.get(method, len(order)), method))
    runs = {method: load_run(outputs, model, method) for method in methods}
    if wanted is not None:
        experiments = [run.experiment() for method, run in runs.items() if run and method in wanted]
        runs = {m: run for m, run in runs.items() if m in wanted or (run and run.experiment() in experiments)}
    found = {method: load_result(outputs, model, method, bench, name) for method in runs}
    found, results = {method: result for method, result in found.items() if result}, {}
    for method, result in found.items():
        # The run says what a repetition repeats: without its run.json (a copied result) there is none.
        own = runs[method]
        by_seed = {own and own.seed: result}
        for other, repetition in found.items():
            run = runs[other]
            if own and run and run.finished and run.experiment() == own.experiment():
                by_seed.setdefault(run.seed, repetition)  # a second run with one seed says nothing of their spread
        results[method] = list(by_seed.values())
    return results


def evaluated_methods(outputs: Path, model: str, benches: list[str], name: str = "") -> list[str]:
    """The folders of `model` with a result of one of `benches`; of runs that differ in the seed alone the first."""
    methods: dict[str, str] = {}
    for bench in benches:
        for method in load_results(outputs, model, bench, name):
            run = load_run(outputs, model, method)
            methods.setdefault(json_fingerprint(run.experiment()) if run else method, method)
    return list(methods.values())


def eval_command(model: str, method: str, bench: str, name: str = "") -> str:
    return f"make eval MODEL={model} METHOD={method} BENCH={bench}" + (f" EVAL_NAME={name} ..." if name else "")


def train_command(model: str, method: str) -> str:
    return f"make train MODEL={model} METHOD={method}"


def model_label(model: str) -> str:
    return PAPER_MODELS.get(model, model)


def method_label(method: str) -> str:
    return METHODS.get(method, method)


def paper_table(name: str) -> pd.DataFrame:
    """One of the paper's tables as printed, e.g. paper_table("table1"), or numbers from its text."""
    return pd.read_csv(Path(__file__).parent / "paper" / f"{name}.csv")


# ------------------ What results were made with


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
    decoding = paper_table("decoding").query("setting == @result.model").drop(columns="setting").to_dict("records")
    paper = {f"generation.{key}": value for row in decoding for key, value in row.items()}
    paper = benchmark.paper | {name: paper[name] for name in paper if name in benchmark.same_per_model}
    for name, expected in paper.items():
        if (value := value_of(result, name)) != as_text(expected):
            of = f"{benchmark.title} of {model_label(result.model)}"
            found.append(f"{of}: {name} is {value}, the paper's is {as_text(expected)}.")
    return found


def figure_notes(results: Iterable[Result]) -> list[str]:
    """What has to be said under a figure: how its results were made and in what unlike the paper's."""
    results = list(results)
    unlike = dict.fromkeys(text for result in results for text in deviations(result))
    return [*unlike, *made_with(results)]
