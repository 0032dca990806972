"""How long a run is and takes: examples, steps, and its arithmetic over what GPUs reach. Estimates.

The range stands for what is not known without a measurement: the share of a GPU's peak that the step reaches.
"""

import math
from pathlib import Path

from rmipo.data.sources import load_sources, mix, mixture_entries
from rmipo.plan.memory import Workload
from rmipo.plan.shapes import Shape
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import ARGUMENTS, DataConfig, of_recipe

# Tokens, UltraFeedback-like and UltraChat-like: they set the expected hours, never the fit.
TYPICAL_PROMPT, TYPICAL_RESPONSE, TYPICAL_DIALOGUE = 220, 320, 1_100

A100 = 312  # TFLOP/s


def reached(tflops: float) -> tuple[float, float]:
    """Share (from, to) of a GPU's peak that a training's matrix products reach, recomputed ones too."""
    # An A100 is slow enough to be kept busy; torchtitan has 33% (eager) to 39% (compiled) for an 8B model on 8 H100.
    return (0.35, 0.5) if tflops <= A100 else (0.2, 0.4)


# Training rows of the recipes' datasets on the hub, by name and split or folder.
ROWS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("Anthropic/hh-rlhf", "helpful-base"): 43_835,
    ("Anthropic/hh-rlhf", "harmless-base"): 42_537,
}


def training_examples(recipe: Recipe) -> int | None:
    """Rows of the training data: counted where all of it is here, known of the recipes' datasets, None of others."""
    config = of_recipe(DataConfig, recipe.values)
    entries = mixture_entries(config)
    if all(Path(entry["path"]).exists() for entry in entries):
        numbers = [rows.select_columns(["row"]) for _, rows in load_sources(config, "train")]
        return len(mix(numbers, config, "train"))
    if len(entries) > 1:
        return None
    part = entries[0].get("data_dir") or entries[0].get("split") or config.dataset_train_split
    rows = ROWS.get((entries[0]["path"], part))
    return rows and min(rows, config.max_train_samples or rows)


def steps(recipe: Recipe, work: Workload, examples: int) -> int:
    """Optimizer steps; `max_steps` takes the place of the epochs."""
    if recipe.values.get("max_steps", -1) > 0:
        return recipe.values["max_steps"]
    rows = math.ceil(examples * TYPICAL_DIALOGUE / work.max_length) if work.packing else examples
    epochs = recipe.values.get("num_train_epochs", ARGUMENTS[recipe.stage].num_train_epochs)
    return math.ceil(math.ceil(rows / work.global_batch) * epochs)


def hours(shape: Shape, work: Workload, gpus: int, examples: int, steps: int, tflops: float) -> tuple[float, float]:
    """Expected hours (from, to) of a run of typical lengths, with its pass of the reference; evaluations and checkpoints
    apart.

    FLOPs per weight and token: 2 forward, 4 backward (2 where weights are frozen), 2 for a layer that is computed again.
    Embeddings are counted too, which makes up for attention. `tflops`: dense bfloat16 peak of one GPU.
    """
    responses = 2 * TYPICAL_RESPONSE
    tokens = TYPICAL_DIALOGUE if work.stage == "sft" else TYPICAL_PROMPT + responses
    gradient = 2 + (2 if work.adapters else 4) + (2 / work.checkpoint_every if work.checkpoint_every else 0)
    forwards = tokens * (work.reference == "logits") + responses * work.prior
    # Scored once, before training starts.
    cached = {"cached": tokens + responses * work.prior, "cached prior": responses}.get(work.reference, 0)
    # A packed row holds several dialogues. The smaller last step of an epoch counts as a whole one.
    per_step = work.global_batch * (work.max_length / TYPICAL_DIALOGUE if work.packing else 1)
    flops = shape.parameters * (steps * per_step * (gradient * tokens + 2 * forwards) + examples * 2 * cached)
    low, high = (flops / (gpus * tflops * 1e12 * share) / 3600 for share in reached(tflops)[::-1])
    return low, high
