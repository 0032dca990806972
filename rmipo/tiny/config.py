"""The knobs of the tiny world, read from `recipes/tiny/world.yaml`."""

from dataclasses import dataclass, fields
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.recipe.files import coerce, read_yaml

SHARES = (
    "held_out_facts",
    "sft_boilerplate",
    "sft_off_topic",
    "sft_prompt_dropped",
    "rejected_boilerplate",
    "label_noise",
)
BYTES_AND_SPECIAL_TOKENS = 262
# Smallest and largest whole numbers. There are 40 names, 12 values of each attribute and 8 phrasings in the world.
RANGES = {
    "seed": (0, 2**63 - 1),
    "names": (2, 40),
    "values_per_attribute": (2, 12),
    "held_out_phrasings": (1, 7),
    "sft_train": (1, 10**7),
    "sft_test": (1, 10**7),
    "pairs_train": (1, 10**7),
    "pairs_test": (1, 10**7),
    "vocab_size": (BYTES_AND_SPECIAL_TOKENS, 2**20),
    "text_vocab_size": (BYTES_AND_SPECIAL_TOKENS, 2**20),
    "hidden_size": (2, 2**14),
    "intermediate_size": (1, 2**16),
    "num_hidden_layers": (1, 100),
    "num_attention_heads": (1, 2**10),
    "max_position_embeddings": (64, 2**20),
}


@dataclass(frozen=True)
class WorldConfig:
    """Every knob; the recipe explains them. Shares are in 0..1.

    Raises:
        ValueError: when made; lists every value out of range.
    """

    seed: int
    names: int
    values_per_attribute: int
    held_out_facts: float
    held_out_phrasings: int
    sft_train: int
    sft_test: int
    sft_boilerplate: float
    sft_off_topic: float
    sft_prompt_dropped: float
    pairs_train: int
    pairs_test: int
    rejected_boilerplate: float
    label_noise: float
    vocab_size: int
    text_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int

    def __post_init__(self):
        ranges = dict.fromkeys(SHARES, (0, 1)) | RANGES
        problems = [
            f"{key} is {getattr(self, key)}: expected {low} to {high}"
            for key, (low, high) in ranges.items()
            if not low <= getattr(self, key) <= high
        ]
        if self.sft_boilerplate + self.sft_off_topic > 1:
            problems.append("sft_boilerplate + sft_off_topic is above 1: the other SFT responses are the right ones")
        facts = self.names * 6
        if not 0 < round(self.held_out_facts * facts) < facts:
            problems.append(f"held_out_facts is {self.held_out_facts}: of {facts} facts some must be held out, not all")
        if self.num_attention_heads > 0 and self.hidden_size % (2 * self.num_attention_heads):
            problems.append(
                f"hidden_size is {self.hidden_size}: expected a multiple of {2 * self.num_attention_heads}, so that "
                f"num_attention_heads {self.num_attention_heads} have one even width"
            )
        if problems:
            raise ConfigError("; ".join(problems))


def load_world_config(path: str | Path) -> WorldConfig:
    """Read the knobs.

    Raises:
        ValueError: names the file and every key that is unknown, missing, of a wrong type or out of range.
    """
    values = read_yaml(path)
    try:
        return make_world_config(values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def make_world_config(values: dict) -> WorldConfig:
    types = {field.name: field.type for field in fields(WorldConfig)}
    problems = [f"{key} is not a knob of the world" for key in values if key not in types]
    problems += [f"{key} is missing" for key in types if key not in values]
    knobs = {}
    for key in [key for key in types if key in values]:
        try:
            knobs[key] = coerce(values[key], types[key])
        except ValueError as error:
            problems.append(f"{key} is {values[key]!r}: {error}")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. The knobs: {', '.join(types)}")
    return WorldConfig(**knobs)
