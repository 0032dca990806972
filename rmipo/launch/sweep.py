"""Grid searches of `recipes/sweeps/<method>.yaml`: their points, the folder of each, and the best of the finished ones.

The files are W&B's format, so that `wandb sweep` runs them as they are.
"""

import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from rmipo.errors import ConfigError
from rmipo.files import write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.launch.pipeline import Step, load_steps
from rmipo.objectives import build_objective
from rmipo.recipe.files import read_yaml, typed
from rmipo.recipe.load import Recipe
from rmipo.record import recorded_run
from rmipo.training.metrics import check_logged, evaluation_metrics

RECORD = "sweep.jsonl"


class Goal(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(pattern="^eval/")]  # on training data the best point would be the largest step
    goal: Literal["maximize", "minimize"]


class Sweep(pydantic.BaseModel):
    """What a sweep file says that is read here; W&B reads the rest."""

    method: Literal["grid"]
    metric: Goal
    parameters: Annotated[dict[str, list], pydantic.Field(min_length=1)]

    @property
    def logged(self) -> str:
        """The metric as in run.json: W&B's charts say eval/x for what the trainer logs as eval_x."""
        return self.metric.name.replace("eval/", "eval_", 1)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination, the last parameter varying fastest."""
        values = itertools.product(*self.parameters.values())
        return [dict(zip(self.parameters, point, strict=True)) for point in values]

    def check_metric(self, recipe: Recipe) -> None:
        """Raises ValueError if the runs of the sweep don't log what they are to be ranked by."""
        check_logged(self.logged, evaluation_metrics(build_objective(recipe.values["objective"])))

    def ranked(self, lines: list[dict]) -> list[dict]:
        """The lines of `sweep.jsonl`, the best first."""
        return sorted(lines, key=lambda line: line[self.logged], reverse=self.metric.goal == "maximize")


def load_sweep(method: str, model: str) -> Sweep:
    """The search of `method`; `recipes/<model>/search.yaml` has ranges that replace the paper's in that setting.

    Raises ConfigError where the points would not be a grid, or nothing on held-out data ranks them.
    """
    path, own = Path(f"recipes/sweeps/{method}.yaml"), Path(f"recipes/{model}/search.yaml")
    content, replaced = read_yaml(path), read_yaml(own) if own.is_file() else {}
    if unknown := replaced.keys() - {"parameters", "measure"}:  # the paper's ranges would be searched in silence
        raise ConfigError(f"{own}: unknown keys {', '.join(unknown)}")
    entries = content["parameters"] | replaced.get("parameters", {})
    values = {key: entry.get("values") for key, entry in entries.items()}
    return typed(Sweep, content | {"parameters": values}, path)


class Point(NamedTuple):
    """One combination of values: what `scripts/launch.py` is told, and the step that it will train."""

    values: dict[str, Any]
    environment: dict[str, str]
    step: Step


def make_point(values: Mapping[str, Any], env: Mapping[str, str]) -> Point:
    """The run of `values` over what `env` says, in a folder named after the values. Raises ConfigError."""
    # The run without these values has the name that METHOD, DATA and adapters give it.
    (unchanged,) = load_steps(env["MODEL"], ["rmipo"], env)
    folder = Path(unchanged.output_dir)
    names = [f"{key.removeprefix('objective.')}-{number(value)}" for key, value in sorted(values.items())]
    output_dir = folder.parent / f"sweep-{folder.name}" / "_".join(names)
    own = f"{env.get('ARGS', '')} {arguments(values)} {shlex.join([f'--output_dir={output_dir}'])}"
    environment = {**env, "STAGE": "rmipo", "ARGS": own}
    (step,) = load_steps(env["MODEL"], ["rmipo"], environment)
    return Point(dict(values), environment, step)


def arguments(values: Mapping[str, Any]) -> str:
    """The overrides of a point as they are written in ARGS."""
    return shlex.join(f"--{key}={number(value)}" for key, value in values.items())


def number(value: Any) -> str:
    """1.0 and 1 alike, as W&B makes no difference between them."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def record(path: Path, points: list[Point], metric: str) -> list[dict]:
    """Write one line for each finished point; returns the lines. Raises ConfigError if their data or models differ."""
    lines, trained_on = [], set()
    for point in points:
        run = recorded_run(point.step.output_dir)
        if run and run["finished"]:
            trained_on.add(json_fingerprint(run["fingerprints"]))
            about = {"output_dir": point.step.output_dir, "seconds": run["seconds"], "commit": run["commit"]}
            lines.append({"values": point.values, metric: run["results"][metric], **about})
    if len(trained_on) > 1:
        raise ConfigError(f"the runs in {path.parent} were trained on different data or models: remove the old ones")
    write_lines(path, lines)
    return lines
