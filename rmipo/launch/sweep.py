"""Grid searches of `recipes/sweeps/<method>.yaml`: their points, the folder of each, and the best of the finished ones.

The files are W&B's format, so that `wandb sweep` runs them as they are. Its agent starts `scripts/sweep.py` for each
point, which gives it a folder of its own; `${envvar:WANDB_RUN_ID}` in the command could not, as the agent fills it in
with the id of the point before.
"""

import itertools
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmipo.errors import ConfigError
from rmipo.files import write_atomically
from rmipo.fingerprints import has_weights, json_fingerprint
from rmipo.launch.choices import choose_search
from rmipo.launch.pipeline import load_steps
from rmipo.objectives import build_objective
from rmipo.recipe.files import parse_overrides, read_yaml
from rmipo.recipe.load import Recipe
from rmipo.record import recorded_run
from rmipo.training.metrics import check_logged, evaluation_metrics

RECORD = "sweep.jsonl"
OWN_KEYS = {"parameters", "measure"}  # of a setting's search.yaml; `measure` is read by make compare


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says: the values of each parameter, and what is to be `goal`d ("maximize" or "minimize")."""

    parameters: dict[str, list]
    metric: str  # as in run.json: eval_common/acc_avg_logp
    goal: str

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination, the last parameter varying fastest."""
        combinations = itertools.product(*self.parameters.values())
        return [dict(zip(self.parameters, values, strict=True)) for values in combinations]

    def ranked(self, lines: list[dict]) -> list[dict]:
        """The lines of `sweep.jsonl`, the best first."""
        return sorted(lines, key=lambda line: line[self.metric], reverse=self.goal == "maximize")


def load_sweep(method: str, model: str) -> Sweep:
    """The search of `method`; `recipes/<model>/search.yaml` has ranges that replace the paper's in that setting.

    Raises:
        ConfigError: what is wrong with either file, all at once.
    """
    path = Path(f"recipes/sweeps/{choose_search({'METHOD': method})}.yaml")
    own = Path(f"recipes/{model}/search.yaml")
    content, replaced = read_yaml(path), read_yaml(own) if own.is_file() else {}
    parameters, problems = {}, []
    if unknown := sorted(replaced.keys() - OWN_KEYS):
        problems.append(f"{', '.join(unknown)} is no key of {own}: expected {' or '.join(sorted(OWN_KEYS))}")
    for given in (content.get("parameters"), replaced.get("parameters")):
        if isinstance(given, dict | None):
            parameters |= given or {}
        else:
            problems.append(f"parameters is {given!r}: expected a block with the values of each parameter")
    metric = content["metric"] if isinstance(content.get("metric"), dict) else {}
    problems += [
        f"parameters.{key} is {entry!r}: expected a block with a list of values, such as values: [1, 2]"
        for key, entry in parameters.items()
        if not isinstance(entry, dict) or not isinstance(entry.get("values"), list) or not entry["values"]
    ]
    if not parameters:
        problems.append("parameters is missing: nothing is searched")
    if content.get("method") != "grid":
        problems.append(f"method is {content.get('method')!r}: expected grid")
    if not str(metric.get("name")).startswith("eval/"):
        problems.append(f"metric.name is {metric.get('name')!r}: expected a held-out one, such as eval/loss")
    if metric.get("goal") not in ("maximize", "minimize"):
        problems.append(f"metric.goal is {metric.get('goal')!r}: expected maximize or minimize")
    if problems:
        raise ConfigError("\n  ".join([f"{path}{f' with {own}' * own.is_file()}:", *problems]))
    # W&B's charts say eval/x for what the trainer logs as eval_x.
    name = metric["name"].replace("eval/", "eval_", 1)
    return Sweep({key: entry["values"] for key, entry in parameters.items()}, name, metric["goal"])


def check_metric(metric: str, recipe: Recipe) -> None:
    """Raises ConfigError if the runs of a sweep don't log what they are to be ranked by."""
    try:
        check_logged(metric, evaluation_metrics(build_objective(recipe.values["objective"])))
    except ValueError as error:
        raise ConfigError(f"metric.name: the sweep would rank its points by {metric}: {error}") from error


@dataclass(frozen=True)
class Point:
    """One combination of values: what `scripts/launch.py` is told, and the recipe that it will train."""

    values: dict[str, Any]
    environment: dict[str, str]
    recipe: Recipe
    done: bool

    @property
    def folder(self) -> Path:
        return Path(self.recipe.values["output_dir"])

    def line(self, run: dict, metric: str) -> dict:
        """What `sweep.jsonl` has about the finished run, `run` being its run.json."""
        kept = {"output_dir": str(self.folder), "seconds": run["seconds"], "commit": run["commit"]}
        return {"values": self.values, metric: run["results"][metric], **kept}


def make_point(values: Mapping[str, Any], env: Mapping[str, str]) -> Point:
    """The run of `values` over what MODEL, METHOD, DATA and ARGS in `env` say, in a folder named after the values.

    Raises:
        ConfigError: the recipe with these values is wrong, or its folder holds another run.
    """
    (unchanged,) = load_steps(env["MODEL"], ["rmipo"], env)
    folder = Path(unchanged.recipe.values["output_dir"])
    names = [f"{key.removeprefix('objective.')}-{number(value)}" for key, value in sorted(values.items())]
    output_dir = folder.parent / f"sweep-{folder.name}" / "_".join(names)
    own = f"{arguments(values)} {shlex.join([f'--output_dir={output_dir}'])}"
    environment = {name: env[name] for name in ("MODEL", "METHOD", "DATA", "GPUS", "SHARDING") if env.get(name)}
    environment |= {"STAGE": "rmipo", "ARGS": f"{env.get('ARGS', '')} {own}".strip()}
    (step,) = load_steps(env["MODEL"], ["rmipo"], environment)
    return Point(dict(values), environment, step.recipe, step.is_done())


def read_point(overrides: list[str]) -> dict[str, Any]:
    """The values in `["--objective.beta=0.1", "--learning_rate=5e-7"]`, as W&B's agent gives them."""

    def flat(values: dict, prefix: str = "") -> dict[str, Any]:
        flattened = {}
        for key, value in values.items():
            flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flattened

    return flat(parse_overrides(overrides))


def arguments(values: Mapping[str, Any]) -> str:
    """The overrides of a point as they are written in ARGS."""
    return shlex.join(f"--{key}={number(value)}" for key, value in values.items())


def number(value: Any) -> str:
    """1.0 and 1 alike, as W&B makes no difference between them."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinct(points: Iterable[Point]) -> list[Point]:
    """One finished point of each data and initial model. Started again, it ends at once, or refuses where either changed.

    It is one that still has its weights, if any has: without them it would be trained again.
    """
    kept: dict[str, Point] = {}
    for point in sorted((point for point in points if point.done), key=lambda point: has_weights(point.folder)):
        kept[json_fingerprint(recorded_run(point.folder)["fingerprints"])] = point
    return list(kept.values())


def record(path: Path, points: list[Point], metric: str) -> list[dict]:
    """Write one line for each finished point; returns the lines."""
    runs = [(point, recorded_run(point.folder)) for point in points]
    lines = [point.line(run, metric) for point, run in runs if run and run["finished"]]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
