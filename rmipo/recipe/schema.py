"""The dataclasses that recipes fill: what a run can be told, with defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Required

import pydantic
import trl
from pydantic import Field, NonNegativeInt, PositiveInt
from trl import SFTConfig
from typing_extensions import TypedDict

from rmipo.recipe.arguments import PairConfig, PreferenceConfig, option

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class PreferenceRunConfig(PreferenceConfig):
    """What a recipe's run adds to the trainer's arguments."""

    reference_cache_dir: str = option("outputs/reference_cache", "Of the reference's log-probs, between runs.")
    generation_samples: NonNegativeInt = option(4, "Held-out prompts that are answered at each evaluation.")
    # On several machines each token of an answer gathers all weights.
    generation_max_new_tokens: PositiveInt | None = option(None, "null: 128, or 32 on several machines.")


@pydantic.with_config({"extra": "forbid"})
class Source(TypedDict, total=False):
    """An entry of the mixture `datasets`: TRL's keys, `revision`, `test_split`, and the handbook's `weight`."""

    path: Required[Annotated[str, Field(min_length=1)]]
    name: str | None  # configuration of a dataset on the hub
    data_dir: str | None
    data_files: str | list | dict | None
    revision: str | None
    split: str | None  # dataset_train_split if null
    test_split: str | None  # dataset_test_split if null
    columns: list[str] | None  # all others are left out
    fraction: Annotated[float, Field(gt=0)] | None  # share of the mixture
    weight: Annotated[float, Field(gt=0, le=1)] | None  # share of this dataset's rows that is taken


@dataclass
class DataConfig:
    """Which data, and how much of it may be unusable. Either `dataset_name` or the mixture `datasets`."""

    dataset_name: str | None = option(None, "Hub id, local folder, or file: JSON, Parquet.")
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_revision: str | None = option(None, "Commit, tag or branch of `dataset_name` on the hub.")
    datasets: list[Source] = field(default_factory=list)
    test_split_size: int | float | None = option(None, "Rows (or share, below 1) set aside if there is no test split.")
    mixture_seed: int = option(0, "Seed of that division, and of the draw from weighted datasets.")
    dataset_num_proc: int | None = None
    max_train_samples: PositiveInt | None = option(None, "Keep only the first rows of the training split.")
    max_eval_samples: PositiveInt | None = None
    max_dropped_fraction: Share = PairConfig.max_dropped_fraction
    max_truncated_fraction: Share = PairConfig.max_truncated_fraction
    chat_template: str | None = option(None, "Template text, or path of a .jinja file; the tokenizer's own if null.")


@dataclass
class ModelConfig(trl.ModelConfig):
    """`trl.ModelConfig` and what may be loaded."""

    allow_pickled_weights: bool = option(False, "Also load weights that are no safetensors: pickles can run code.")


def of_recipe(cls: type, values: Mapping[str, Any]) -> Any:
    """A `cls` from those of a recipe's values that are its fields."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


ARGUMENTS = {"sft": SFTConfig, "preference": PreferenceRunConfig}
# Used up in the recipe: no fields of the dataclasses.
RECIPE_ONLY = {"global_batch_size": PositiveInt, "memory_check": bool}
