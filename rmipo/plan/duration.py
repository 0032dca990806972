"""How long a run is and takes: examples, steps, and its arithmetic over what GPUs reach. Estimates."""

import math
from pathlib import Path

from rmipo.data.sources import load_rows, mixture_entries
from rmipo.plan.memory import Workload
from rmipo.plan.shapes import Shape
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import ARGUMENTS, DataConfig, of_recipe

# Tokens, UltraFeedback-like and UltraChat-like: they set the expected hours, never the fit.
TYPICAL_PROMPT, TYPICAL_RESPONSE, TYPICAL_DIALOGUE = 220, 320, 1_100

A100 = 312  # TFLOP/s
# Share of a GPU's peak that a training's matrix products reach: torchtitan has 33% to 39% for an 8B model on 8 H100.
REACHED = (0.25, 0.5)
ASSUMED_ROWS = {"preference": 61_135, "sft": 207_865}  # of UltraFeedback and UltraChat


def training_examples(recipe: Recipe) -> tuple[int, bool]:
    """Rows of the training data, and whether they were counted: of data that is not here they are assumed."""
    config = of_recipe(DataConfig, recipe.values)
    if all(Path(entry["path"]).exists() for entry in mixture_entries(config)):
        return len(load_rows(config, "train", lambda rows, _: rows.select_columns(["row"]))), True
    rows = ASSUMED_ROWS[recipe.stage]
    return min(rows, config.max_train_samples or rows), False


def steps(recipe: Recipe, work: Workload, examples: int) -> int:
    """Optimizer steps; `max_steps` takes the place of the epochs."""
    if recipe.values.get("max_steps", -1) > 0:
        return recipe.values["max_steps"]
    rows = math.ceil(examples * TYPICAL_DIALOGUE / work.packed_length) if work.packed_length else examples
    epochs = recipe.values.get("num_train_epochs", ARGUMENTS[recipe.stage].num_train_epochs)
    return math.ceil(math.ceil(rows / work.global_batch) * epochs)


def hours(shape: Shape, work: Workload, gpus: int, steps: int, tflops: float) -> tuple[float, float]:
    """Expected hours (from, to) of a run of typical lengths; evaluations and checkpoints apart.

    FLOPs per weight and token: 2 forward, 4 backward (2 where weights are frozen), 2 for a layer that is computed again,
    2 for each score without gradient. Embeddings are counted too, which makes up for attention. `tflops`: dense bfloat16
    peak of one GPU.
    """
    responses = 2 * TYPICAL_RESPONSE
    tokens = TYPICAL_DIALOGUE if work.stage == "sft" else TYPICAL_PROMPT + responses
    gradient = 2 + (2 if work.adapters else 4) + (2 / work.checkpoint_every if work.checkpoint_every else 0)
    scored = tokens * work.scores_pairs + responses * work.scores_responses
    # A packed row holds several dialogues. The smaller last step of an epoch counts as a whole one.
    per_step = work.global_batch * (work.packed_length / TYPICAL_DIALOGUE if work.packed_length else 1)
    flops = shape.parameters * steps * per_step * (gradient * tokens + 2 * scored)
    return tuple(flops / (gpus * tflops * 1e12 * share) / 3600 for share in reversed(REACHED))
