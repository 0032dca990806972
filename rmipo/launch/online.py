"""`make online`: sample, score, pair and train, round after round, each from the policy of the round before.

outputs/<model>/online-<method>/ holds pairs-1, round-1, pairs-2, ...: folders of pairs and ordinary runs.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pydantic

from rmipo.generation.pairs import PairsConfig

Count = Annotated[int, pydantic.Field(ge=1)]


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class OnlineConfig:
    """The keys of an online.yaml, which explains them."""

    prompts_per_round: Count
    pairs: PairsConfig
    held_out: str
    held_out_prompts: Count
    overrides: Annotated[list[dict], pydantic.Field(min_length=1)]


@dataclass
class Round:
    """One round in the folder `home`; the first is number 1. `start`: the policy before the first."""

    config: OnlineConfig
    home: Path
    start: Path
    number: int

    def __post_init__(self):
        before, size = self.number - 1, self.config.prompts_per_round
        self.folder, self.pairs = self.home / f"round-{self.number}", self.home / f"pairs-{self.number}"
        # The model that answers in this round, and that its training starts from.
        self.policy = self.home / f"round-{before}" if before else self.start
        # No prompt is answered twice.
        self.pairs_config = replace(self.config.pairs, skip_prompts=before * size, max_prompts=size)

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """What `scripts/launch.py` is told: `env` with the round's overrides under those in ARGS, which win."""
        arguments = shlex.split(env.get("ARGS", ""))
        given = {argument.partition("=")[0] for argument in arguments}
        # The last entry holds for all rounds after it.
        overrides = self.config.overrides[: self.number][-1]
        values = {key: json.dumps(value) for key, value in overrides.items()}
        values |= {"dataset_name": self.pairs, "model_name_or_path": self.policy, "output_dir": self.folder}
        own = [f"--{key}={value}" for key, value in values.items() if f"--{key}" not in given]
        # In one group W&B draws the rounds over each other.
        group = env.get("WANDB_RUN_GROUP") or f"{self.home.parent.name}-{self.home.name}"
        return {**env, "STAGE": "rmipo", "DATA": "", "ARGS": shlex.join([*own, *arguments]), "WANDB_RUN_GROUP": group}
