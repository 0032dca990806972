"""How long a run is, as far as it is known without a download: examples, steps, checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from rmipo.data.sources import load_sources, mix, mixture_entries
from rmipo.plan.memory import TYPICAL_DIALOGUE, Run
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import DataConfig

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
    return math.ceil(
        math.ceil(rows / run.global_batch) * values.get("num_train_epochs", TrainingArguments.num_train_epochs)
    )


def examples_seen(values: Mapping, run: Run, examples: int) -> float:
    """Examples that a run trains on, each as often as it comes up."""
    if values.get("max_steps", -1) > 0:
        per_row = run.max_length / TYPICAL_DIALOGUE if run.packing else 1
        return values["max_steps"] * run.global_batch * per_row
    return examples * values.get("num_train_epochs", TrainingArguments.num_train_epochs)


def kept_checkpoints(recipe: Recipe, run: Run) -> int:
    """The most checkpoints that are on the disk at once: `save_total_limit` and the one being written, or all of a run.

    Without a limit, and where the length of the run is not known, two: fewer there can't be.
    """
    values = recipe.values
    limit, saves = values.get("save_total_limit"), _saves(recipe, run)
    if limit is None:
        return 2 if saves is None else saves
    return limit + 1 if saves is None else min(limit + 1, saves)


def _saves(recipe: Recipe, run: Run) -> int | None:
    """Checkpoints of the whole run, the one at its end included; None where that is not known."""
    values = recipe.values
    strategy, every = values.get("save_strategy", "steps"), values.get("save_steps", TrainingArguments.save_steps)
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return math.ceil(values.get("num_train_epochs", TrainingArguments.num_train_epochs))
    if strategy != "steps":
        return None
    if every < 1:
        return math.ceil(1 / every)
    if values.get("max_steps", -1) <= 0 and values.get("save_total_limit") is not None:
        return None  # not worth counting the data for
    if values.get("max_steps", -1) > 0:
        return math.ceil(values["max_steps"] / every)
    examples = training_examples(recipe)
    return examples and math.ceil(steps(values, run, examples) / every)
