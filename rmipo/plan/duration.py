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

A100 = 312.0  # TFLOP/s


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


def forward_flops(shape: Shape, work: Workload, prior: bool = False) -> tuple[float, float]:
    """(layers, LM head) FLOPs of one forward of a typical example, or of its responses without their prompt.

    2 per weight and token; causal attention adds 2 q per layer, token and token of the sequence.
    """
    if work.stage == "sft":
        tokens = scored = sequence = TYPICAL_DIALOGUE
    else:  # through the layers, through the head, and what one token may attend to
        scored = 2 * TYPICAL_RESPONSE
        tokens, sequence = TYPICAL_PROMPT + scored, TYPICAL_PROMPT + TYPICAL_RESPONSE
    if prior:
        tokens, sequence = scored, TYPICAL_RESPONSE
    layers = 2 * shape.body * tokens + 2 * shape.layers * shape.heads_width * sequence * tokens
    return float(layers), 2.0 * shape.vocabulary * shape.hidden * scored


def reference_flops(shape: Shape, work: Workload) -> float:
    """FLOPs to score one example with the initial policy, before training starts."""
    without_prompt = sum(forward_flops(shape, work, prior=True))
    if work.reference == "cached":
        return sum(forward_flops(shape, work)) + without_prompt * work.prior
    return without_prompt * (work.reference == "cached prior")


def step_flops(shape: Shape, work: Workload) -> float:
    """FLOPs of one example in a training step: forward 1, backward 2 (frozen weights: 1), and what is computed again."""
    layers, head = forward_flops(shape, work)
    backward = 1 if work.adapters else 2
    again = math.ceil(shape.layers / work.checkpoint_every) / shape.layers if work.checkpoint_every else 0.0
    total = layers * (1 + backward + again) + head * (1 + backward + work.fused_head)
    total += sum(forward_flops(shape, work, prior=True)) * work.prior
    return total + (layers + head) * (work.reference == "logits")


def hours(shape: Shape, work: Workload, gpus: int, examples: int, steps: int, tflops: float) -> tuple[float, float]:
    """Expected hours (from, to) of a run, with its pass of the reference; evaluations and checkpoints apart.

    `tflops`: dense bfloat16 peak of one GPU.
    """
    # An epoch of few examples ends with a smaller step; the estimate takes it for a whole one.
    per_step = work.global_batch * (work.max_length / TYPICAL_DIALOGUE if work.packing else 1)
    flops = steps * per_step * step_flops(shape, work) + examples * reference_flops(shape, work)
    low, high = (flops / (gpus * tflops * 1e12 * share) / 3600 for share in reached(tflops)[::-1])
    return low, high
