"""The dataclasses that recipes fill: what a run can be told, with defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import pydantic
import trl
from pydantic import Field, PositiveInt
from trl import SFTConfig

from rmipo.errors import ConfigError
from rmipo.recipe.arguments import PairConfig, PreferenceConfig, option

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class PreferenceRunConfig(PreferenceConfig):
    """What a recipe's run adds to the trainer's arguments."""

    reference_cache_dir: str = option(
        "outputs/reference_cache", "Where the reference's log-probs are kept between runs."
    )
    generation_samples: int = option(4, "Held-out prompts that are answered and saved at each evaluation.")
    generation_max_new_tokens: PositiveInt | None = option(
        None, "Tokens of each such answer; null: 128, or 32 on several machines, where each gathers all weights."
    )


class Source(pydantic.BaseModel, extra="forbid"):
    """An entry of the mixture `datasets`: TRL's keys, `revision`, `test_split`, and the handbook's `weight`."""

    path: Annotated[str, Field(min_length=1)]
    name: str | None = None  # configuration of a dataset on the hub
    data_dir: str | None = None
    data_files: str | list | dict | None = None
    revision: str | None = None
    split: str | None = None  # dataset_train_split if null
    test_split: str | None = None  # dataset_test_split if null
    columns: list[str] | None = None  # all others are left out
    fraction: Annotated[float, Field(gt=0)] | None = None  # share of the mixture
    weight: Annotated[float, Field(gt=0, le=1)] | None = None  # share of this dataset's rows that is taken


@dataclass
class DataConfig:
    """Which data, and how much of it may be unusable. Either `dataset_name` or the mixture `datasets`.

    Raises ConfigError, when made, with a line for each thing that is wrong in it.
    """

    dataset_name: str | None = option(None, "Hub id, local folder, or file: JSON, Parquet.")
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_revision: str | None = option(None, "Commit, tag or branch of `dataset_name` on the hub.")
    datasets: list[dict] = field(default_factory=list, metadata={"help": "Entries with the keys of `Source`."})
    test_split_size: int | float | None = option(None, "Rows (or share, below 1) set aside if there is no test split.")
    mixture_seed: int = option(0, "Seed of that division, and of the draw from weighted datasets.")
    dataset_num_proc: int | None = None
    max_train_samples: PositiveInt | None = option(None, "Keep only the first rows of the training split.")
    max_eval_samples: PositiveInt | None = None
    max_dropped_fraction: Share = PairConfig.max_dropped_fraction
    max_truncated_fraction: Share = PairConfig.max_truncated_fraction
    chat_template: str | None = option(None, "Template text, or path of a .jinja file; the tokenizer's own if null.")

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError("\n  ".join(problems))

    def _problems(self) -> Iterator[str]:
        size = self.test_split_size
        if size is not None and not (0 < size < 1 if isinstance(size, float) else size >= 1):
            yield f"test_split_size is {size}: expected a share between 0 and 1, or a whole number of rows"
        if size is not None and self.dataset_test_split != DataConfig.dataset_test_split:
            yield "dataset_test_split has no effect with test_split_size, which takes rows of the training split: keep one"
        if self.datasets and (self.dataset_config or self.dataset_revision):
            yield "dataset_config and dataset_revision have no effect with datasets: use the entries' name and revision"
        if len({entry.get("fraction") is None for entry in self.datasets}) > 1:
            yield "datasets: fraction must be set for every dataset of the mixture or for none"
        typed = []
        for number, entry in enumerate(self.datasets):
            try:
                typed.append(Source(**entry).model_dump(exclude_unset=True))
            except pydantic.ValidationError as error:
                for each in error.errors():
                    yield f"datasets[{number}].{each['loc'][0]} is {each['input']!r}: {each['msg']}"
        self.datasets = typed  # and not into the recipe's own list, which is recorded as it was written


@dataclass
class ModelConfig(trl.ModelConfig):
    """`trl.ModelConfig` and what may be loaded."""

    allow_pickled_weights: bool = option(False, "Also load weights that are no safetensors: pickles can run code.")

    def __post_init__(self) -> None:
        super().__post_init__()  # makes a text of a list of one: a pattern, which the name of a module doesn't match
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]


def of_recipe(cls: type, values: Mapping[str, Any]) -> Any:
    """A `cls` from those of a recipe's values that are its fields."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


ARGUMENTS = {"sft": SFTConfig, "preference": PreferenceRunConfig}
# Used up in the recipe: no fields of the dataclasses.
RECIPE_ONLY = {"global_batch_size": PositiveInt, "prefer_local": str | None, "memory_check": bool}
