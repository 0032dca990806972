"""What a benchmark is to the rest of the repository: how it is run, what it measures, and which results compare.

Modules with a benchmark import torch, transformers and the field's packages inside functions: the registry is also
read by tables and command lines, which have to start at once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rmipo.generation.judge import shown
from rmipo.recipe.files import merge_settings

# Settings that change what an evaluation costs or how it goes on, and not what it measures.
COSTS_ALONE = {"price", "max_cost", "concurrency", "max_missing", "generate_only", "batch_size", "engine"}

# How a model is sampled, where each may be sampled in its own way: for `same_per_model`.
DECODING = tuple(f"generation.{key}" for key in ("temperature", "top_p", "top_k", "max_new_tokens", "dtype"))


@dataclass(frozen=True)
class Metric:
    """A number of a result that tables and figures show; `<name>_standard_error` beside it is its standard error."""

    label: str
    digits: int = 1
    better: bool | None = True  # whether higher is better; None: neither is, and no best is marked
    detail: bool = False  # a part of another metric: in a table of this benchmark alone


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; the registry is `rmipo.evaluation.BENCHMARKS`.

    `measure` takes (folder of the model, folder of its results, settings with the defaults filled in) and returns
    {"metrics", "versions", "settings"}, or None where answers were generated and nothing judged. The returned settings hold
    everything that the numbers depend on. Beside them perhaps "per_prompt": metric -> its value for each prompt, in their
    order, None without one; two methods are then compared prompt by prompt. Or "draws": metric -> its value for each of the
    same draws of the prompts (`statistics.resamples`), for a metric that is no mean over prompts.

    Names of settings may lead into a block with dots, e.g. "generation.temperature".
    """

    name: str  # value of BENCH, block of eval.yaml, and name of the result file
    title: str
    measure: Callable[[Path, Path, dict], dict | None]
    # Overridden by eval.yaml and --set. `generation` is eval.yaml's common block with the benchmark's own over it; `price`
    # (US dollars per million input and output tokens) means a judge.
    defaults: dict
    metrics: dict[str, Metric]  # a result may hold more than these
    same: tuple[str, ...]  # settings that must be equal between results in one table, as package versions must
    same_per_model: tuple[str, ...] = ()  # settings that must be equal between the methods of one model
    optional: tuple[str, ...] = ()  # those of `same` that don't contradict anything where they are absent
    trial: tuple[str, ...] = ()  # settings that make another benchmark of it, or a part, where they aren't the default
    in_paper: bool = False  # BENCH=all means those
    paper: dict[str, object] = field(default_factory=dict)  # settings of the paper's numbers, where results may differ
    parts: str | None = None  # a setting that lists parts; more of them can be added to a finished result

    def run(self, model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict | None:
        """The result of a model. Raises EvaluationError for wrong settings, before the model is loaded."""
        return self.measure(Path(model_dir), Path(output_dir), merge_settings(self.name, self.defaults, settings))


def benchmark_settings(settings: dict[str, dict], benchmark: Benchmark) -> dict:
    """The block of one benchmark; its own `generation`, where it answers prompts, lies over the common one."""
    own = dict(settings.get(benchmark.name, {}))
    if "generation" in benchmark.defaults:
        own["generation"] = settings.get("generation", {}) | own.get("generation", {})
    return own


def contradictions(asked: dict, recorded: dict, prefix: str = "") -> list[str]:
    """The settings in `asked` (those that are given) that a finished result with the settings `recorded` hasn't.

    A judged result contradicts another OPENAI_BASE_URL too, where that is set.
    """
    found = []
    for key, value in asked.items():
        if isinstance(value, dict) and isinstance(recorded.get(key), dict):
            found += contradictions(value, recorded[key], f"{prefix}{key}.")
        # What isn't recorded had no part in it.
        elif key not in COSTS_ALONE and value != recorded.get(key, value):
            found.append(f"{prefix}{key} is {recorded[key]!r} there, {value!r} here")
    if "judge_endpoint" in recorded and (url := os.environ.get("OPENAI_BASE_URL")):
        here, there = shown(url.rstrip("/")), recorded["judge_endpoint"]
        found += [f"the judge's endpoint is {there} there, {here} here"] * (here != there)
    return found
