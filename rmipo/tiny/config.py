"""The knobs of the tiny world, read from `recipes/tiny/world.yaml`."""

from pathlib import Path
from typing import Annotated

import pydantic

from rmipo.recipe.files import read_yaml, typed

Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class WorldConfig:
    """Every knob; the recipe explains them."""

    seed: int
    names: Annotated[int, pydantic.Field(ge=2, le=40)]  # there are 40 in `world.NAMES`
    values_per_attribute: Annotated[int, pydantic.Field(ge=2, le=12)]
    held_out_facts: Share
    held_out_phrasings: Annotated[int, pydantic.Field(ge=1, le=7)]  # of 8: SFT asks in the others
    sft_train: int
    sft_test: int
    sft_boilerplate: Share
    sft_off_topic: Share
    sft_prompt_dropped: Share
    pairs_train: int
    pairs_test: int
    rejected_boilerplate: Share
    label_noise: Share
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int


def load_world_config(path: str | Path) -> WorldConfig:
    """Read the knobs. Raises ConfigError that names the file and every wrong key."""
    return typed(WorldConfig, read_yaml(path), path)
