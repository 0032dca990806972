"""What a benchmark is to the rest of the repository: how it is run, what it measures, which results compare, where they show.

Modules with a benchmark import torch, transformers and the field's packages inside functions: the registry is also
read by tables and command lines, which have to start at once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rmipo.generation.judge import shown
from rmipo.recipe.files import merge_settings
from rmipo.record import recorded_run

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


def details(prefix: str, labels: dict[str, str], digits: int = 1) -> dict[str, Metric]:
    """The parts of another metric: `<prefix>_<name>` for each name -> label."""
    return {f"{prefix}_{name}": Metric(label, digits, detail=True) for name, label in labels.items()}


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


def publish(folder: Path, benchmark: Benchmark, result: dict, name: str = "") -> None:
    """Show `result` of a model in `folder` that a run of ours trained: in its card, and in the W&B run that trained it.

    `name`: of the evaluation, where it has one (EVAL_NAME): its numbers stand beside those of the one without.
    """
    run = recorded_run(folder)
    if run is None:
        return
    metrics = {key: float(value) for key, value in result["metrics"].items() if key in benchmark.metrics}
    if (folder / "README.md").is_file():
        write_to_card(folder / "README.md", benchmark, name or None, metrics, result["settings"])
    if "wandb" not in run["recipe"].get("report_to", "none"):
        return
    import wandb

    from rmipo.run.callbacks import close_wandb, open_wandb

    key = f"eval/{benchmark.name}{f'-{name}' * bool(name)}"
    open_wandb(None, run["wandb_run_id"])
    wandb.run.summary.update({f"{key}/{metric}": value for metric, value in metrics.items()})
    if columns := result.get("per_prompt"):
        rows = [[number, *values] for number, values in enumerate(zip(*columns.values(), strict=True))]
        wandb.log({key: wandb.Table(["prompt", *columns], rows)})
    close_wandb(None)


def write_to_card(path: Path, benchmark: Benchmark, name: str | None, metrics: dict, settings: dict) -> None:
    """Add the metrics to the `model-index` in the card's header, which the hub shows, in place of an earlier result's."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(path)
    card.data.model_name = card.data.model_name or path.parent.resolve().name
    # A part of a benchmark says which: its number compares with no whole one's.
    part = {key: settings[key] for key in benchmark.trial if settings.get(key) != benchmark.defaults.get(key)}
    about = {"dataset_type": benchmark.name, "dataset_config": name, "dataset_name": benchmark.title}
    about |= {"task_type": "text-generation", "dataset_args": part or None}
    # The hub tells results apart by type and configuration.
    mine = benchmark.name, name
    results = [one for one in card.data.eval_results or [] if (one.dataset_type, one.dataset_config) != mine]
    for key, value in metrics.items():
        label = benchmark.metrics[key].label
        results.append(EvalResult(metric_type=key, metric_name=label, metric_value=round(value, 4), **about))
    card.data.eval_results = results
    card.save(path)
