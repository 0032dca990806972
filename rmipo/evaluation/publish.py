"""Where the result of an evaluation is shown beside its file: in the card of the model, and in the W&B run that trained it."""

from pathlib import Path

from rmipo.evaluation.benchmark import Benchmark
from rmipo.record import recorded_run


def publish(folder: Path, benchmark: Benchmark, result: dict, name: str = "") -> None:
    """Show `result` of a model that a run of ours trained; of other models there is no card and no W&B run of ours.

    Args:
        name: of the evaluation, where it has one (EVAL_NAME): its numbers stand beside those of the one without.
    """
    run = recorded_run(folder)
    if run is None:
        return
    metrics = {key: value for key, value in result["metrics"].items() if key in benchmark.metrics}
    if (folder / "README.md").is_file():
        write_to_card(folder / "README.md", benchmark, name or None, metrics, result["settings"])
    if "wandb" in run["recipe"].get("report_to", "none"):
        write_to_wandb(run["wandb_run_id"], f"eval/{benchmark.name}{f'-{name}' * bool(name)}", metrics, result)


def write_to_card(path: Path, benchmark: Benchmark, name: str | None, metrics: dict, settings: dict) -> None:
    """Add the metrics to the `model-index` in the card's header, which the hub shows, in place of an earlier result's."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(path)
    card.data.model_name = card.data.model_name or path.parent.resolve().name
    # A part of a benchmark says which: its number compares with no whole one's.
    part = {key: settings[key] for key in benchmark.trial if settings.get(key) != benchmark.defaults.get(key)}
    dataset = {"dataset_type": benchmark.name, "dataset_config": name, "dataset_name": benchmark.title}
    task = {"task_type": "text-generation", "dataset_args": part or None}
    # The hub tells results apart by type and configuration.
    mine = benchmark.name, name
    results = [one for one in card.data.eval_results or [] if (one.dataset_type, one.dataset_config) != mine]
    for key, value in metrics.items():
        metric = {"metric_type": key, "metric_name": benchmark.metrics[key].label, "metric_value": round(value, 4)}
        results.append(EvalResult(**task, **dataset, **metric))
    card.data.eval_results = results
    card.save(path)


def write_to_wandb(run_id: str, key: str, metrics: dict, result: dict) -> None:
    """Continue the W&B run: the metrics in its summary, each prompt's values in a table."""
    import wandb

    from rmipo.run.callbacks import close_wandb, open_wandb

    open_wandb(None, run_id)
    wandb.run.summary.update({f"{key}/{name}": value for name, value in metrics.items()})
    columns = result.get("per_prompt", {})
    if columns:
        rows = [[number, *values] for number, values in enumerate(zip(*columns.values(), strict=True))]
        wandb.log({key: wandb.Table(["prompt", *columns], rows)})
    close_wandb(None)
