"""How long a run is, as far as it is known without a download: examples, steps, checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from rmipo.data.sources import load_sources, mix, mixture_entries
from rmipo.plan.memory import Run
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import ARGUMENTS, DataConfig

TYPICAL_PROMPT, TYPICAL_RESPONSE = 220, 320  # tokens, UltraFeedback-like; set the expected hours, never the fit
TYPICAL_DIALOGUE = 1_100  # tokens, UltraChat-like

# Training rows of the recipes' datasets on the hub, by name and split or folder.
ROWS = {
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("Anthropic/hh-rlhf", "helpful-base"): 43_835,
    ("Anthropic/hh-rlhf", "harmless-base"): 42_537,
}


def training_examples(recipe: Recipe) -> int | None:
    """Rows of the training data: counted where all of it is here, known of the recipes' datasets, None of others.

    Raises:
        DataError: data that is here and can't be read.
    """
    config = DataConfig(**{f.name: recipe.values[f.name] for f in fields(DataConfig) if f.name in recipe.values})
    entries = mixture_entries(config)
    if all(Path(entry["path"]).exists() for entry in entries):
        numbers = [rows.select_columns(["row"]) for _, rows in load_sources(config, "train")]
        return len(mix(numbers, config, "train"))
    if len(entries) > 1:
        return None
    part = entries[0].get("data_dir") or entries[0].get("split") or config.dataset_train_split
    rows = ROWS.get((entries[0]["path"], part))
    return rows and min(rows, config.max_train_samples or rows)


def steps(values: Mapping, run: Run, examples: int) -> int:
    """Optimizer steps of a run on `examples`; `max_steps` in the recipe's `values` takes the place of the epochs."""
    if values.get("max_steps", -1) > 0:
        return values["max_steps"]
    rows = math.ceil(examples * TYPICAL_DIALOGUE / run.max_length) if run.packing else examples
    return math.ceil(math.ceil(rows / run.global_batch) * epochs(values))


# Measured on UltraFeedback's lengths, token packing: share of a step that GPUs wait for the one with the longest pairs.
WAITING = {2: "43% to 48%", 4: "8% to 11%"}  # by pairs that a GPU has of a step
ENOUGH_PAIRS = 8


def waiting(run: Run, gpus: int) -> str | None:
    """The share of a step that is waiting where each of `gpus` has few of its pairs; None where it is small."""
    pairs = run.global_batch / gpus
    return next((share for most, share in WAITING.items() if run.stage == "preference" and pairs <= most), None)


def epochs(values: Mapping) -> float:
    arguments = ARGUMENTS["preference" if "objective" in values else "sft"]
    return values.get("num_train_epochs", arguments.num_train_epochs)


def examples_seen(values: Mapping, run: Run, examples: int) -> float:
    """Examples that a run trains on, each as often as it comes up."""
    if values.get("max_steps", -1) > 0:
        per_row = run.max_length / TYPICAL_DIALOGUE if run.packing else 1
        return values["max_steps"] * run.global_batch * per_row
    return examples * epochs(values)


def occasions(values: Mapping, what: str, steps: int | None) -> int | None:
    """How often a run of `steps` optimizer steps saves (`what`: "save") or evaluates ("eval"); None: not known."""
    strategy = values.get(f"{what}_strategy", "steps" if what == "save" else "no")
    every = values.get(f"{what}_steps") or TrainingArguments.save_steps
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(epochs(values))
    if strategy == "steps" and every < 1:
        return math.ceil(1 / every)
    return math.ceil(steps / every) if strategy == "steps" and steps else None


def kept_checkpoints(recipe: Recipe, run: Run) -> int:
    """The most checkpoints that are on the disk at once: `save_total_limit` and the one being written, or all of a run.

    A run that is stopped saves one more than those of its schedule. Without a limit, and where the length of the run is
    not known, two: fewer there can't be.
    """
    values, limit = recipe.values, recipe.values.get("save_total_limit")
    total = values["max_steps"] if values.get("max_steps", -1) > 0 else None
    if total is None and limit is None:  # else the data need not be counted
        examples = training_examples(recipe)
        total = examples and steps(values, run, examples)
    saves = occasions(values, "save", total)
    if limit is None:
        return 2 if saves is None else saves + 1
    return limit + 1 if saves is None else min(limit + 1, saves + 1)
