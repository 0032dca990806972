"""The knobs of the tiny world, read from `recipes/tiny/world.yaml`."""

from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import Field

from rmipo.recipe.files import read_yaml, typed

BYTES_AND_SPECIAL_TOKENS = 262  # what the tokenizer starts from
Share = Annotated[float, Field(ge=0, le=1)]
Rows = Annotated[int, Field(ge=1, le=10**7)]


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class WorldConfig:
    """Every knob; the recipe explains them. Raises pydantic's ValidationError that lists every value out of range."""

    seed: Annotated[int, Field(ge=0)]
    names: Annotated[int, Field(ge=2, le=40)]  # there are 40 in `world.NAMES`
    values_per_attribute: Annotated[int, Field(ge=2, le=12)]
    held_out_facts: Share
    held_out_phrasings: Annotated[int, Field(ge=1, le=7)]  # of 8: SFT asks in the others
    sft_train: Rows
    sft_test: Rows
    sft_boilerplate: Share
    sft_off_topic: Share
    sft_prompt_dropped: Share
    pairs_train: Rows
    pairs_test: Rows
    rejected_boilerplate: Share
    label_noise: Share
    vocab_size: Annotated[int, Field(ge=BYTES_AND_SPECIAL_TOKENS, le=2**20)]
    hidden_size: Annotated[int, Field(ge=2)]
    intermediate_size: Annotated[int, Field(ge=1)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=100)]
    num_attention_heads: Annotated[int, Field(ge=1)]
    max_position_embeddings: Annotated[int, Field(ge=64)]

    def __post_init__(self):
        if self.sft_boilerplate + self.sft_off_topic > 1:
            raise ValueError("sft_boilerplate + sft_off_topic is above 1: the other SFT responses are the right ones")
        facts = self.names * 6
        if not 0 < round(self.held_out_facts * facts) < facts:
            raise ValueError(f"held_out_facts is {self.held_out_facts}: of {facts} facts hold out some, not all")
        if self.hidden_size % (2 * self.num_attention_heads):  # rotary embeddings need heads of an even width
            raise ValueError(f"hidden_size is {self.hidden_size}: no multiple of 2 x num_attention_heads")


def load_world_config(path: str | Path) -> WorldConfig:
    """Read the knobs. Raises ConfigError that names the file and every wrong key."""
    return typed(WorldConfig, read_yaml(path), path)
