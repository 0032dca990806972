"""What the steps behind a table cost: GPU hours by the paper or by `make plan`'s estimate, dollars for judges."""

from pathlib import Path

from rmipo.evaluation import BENCHMARKS
from rmipo.recipe.files import read_yaml
from rmipo.reporting.results import PAPER_MODELS, RECIPES, paper_table

PAPER_GPUS = 4  # A800 80 GB
ULTRAFEEDBACK = ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")  # the on-policy sets have about as many pairs


def base_method(method: str) -> str:
    """The method whose cost an ablation has: Table 5's rows name it, all others are variants of RMiPO."""
    prefix, _, name = method.partition("-")
    if prefix == "table5":
        return name
    return "rmipo" if prefix.startswith("table") else method


def paper_hours(model: str, method: str) -> float | None:
    """Wall-clock hours of a training on PAPER_GPUS, by Figure 7, which doesn't say the model; None where it has none."""
    hours = paper_table("efficiency").set_index("method")["hours"]
    return hours.get(base_method(method)) if model in PAPER_MODELS else None


def planned_hours(model: str, method: str) -> float | None:
    """The same by the estimate of `make plan`; None for recipes that train on the CPU. `method`: "sft" for that stage.

    Raises ValueError for a recipe that can't be read, or whose model's sizes can't.
    """
    path = RECIPES / model / ("sft.yaml" if method == "sft" else "rmipo.yaml")
    if path.is_file() and read_yaml(path).get("use_cpu"):
        return None
    from rmipo.plan import duration, lengths, preflight  # bring in torch
    from rmipo.plan.memory import Hardware, Sharding
    from rmipo.recipe.load import load_recipe

    recipe = load_recipe(path, overlays(method))
    rows = lengths.training_examples(recipe) or lengths.ROWS[ULTRAFEEDBACK]
    shape, run, hardware = preflight.shape_of(recipe), preflight.run_of(recipe), Hardware(1, PAPER_GPUS, 80)
    phases = duration.hours(recipe, shape, run, Sharding("zero3"), hardware, rows, duration.A100_TFLOPS)
    return sum(phases["total"]) / 2


def estimate_assumptions() -> str:
    """What the estimate rests on, and how far it is from the paper where both have a number."""
    from rmipo.plan import duration, lengths

    model, method = "llama3-8b-instruct", "rmipo"
    low, high = duration.UTILIZATION
    return (
        f"The middle of `make plan`'s range. Assumed: {low:.0%} to {high:.0%} of {duration.A100_TFLOPS:g} TFLOP/s, pairs of "
        f"{lengths.TYPICAL_PROMPT} + 2 x {lengths.TYPICAL_RESPONSE} tokens, dialogues of {lengths.TYPICAL_DIALOGUE}. For "
        f"{method} of {model} it says {planned_hours(model, method):.1f} h, the paper {paper_hours(model, method)}."
    )


def verdict_assumptions() -> str:
    each = "; ".join(
        f"{bench.name} {bench.verdicts} verdicts of {bench.verdict_tokens[0]} + {bench.verdict_tokens[1]} tokens"
        for bench in BENCHMARKS.values()
        if bench.verdicts
    )
    return f"Assumed: {each}, at the price in eval.yaml. make eval prints its own estimate before the first call."


def overlays(method: str) -> list[Path]:
    files = [RECIPES / folder / f"{method}.yaml" for folder in ("methods", "ablations")]
    return [file for file in files if file.is_file()]


def judge_dollars(model: str, bench: str) -> float | None:
    """What the judge of one evaluation costs at the price in the model's eval.yaml; None without a judge."""
    benchmark = BENCHMARKS[bench]
    settings = read_yaml(RECIPES / model / "eval.yaml").get(bench, {})
    if not benchmark.verdicts or "price" not in settings:
        return None
    dollars = sum(n * price for n, price in zip(benchmark.verdict_tokens, settings["price"], strict=True))
    return benchmark.verdicts * dollars / 1e6
