"""`make online`: sample, score, pair and train, round after round, each from the policy of the round before.

outputs/<model>/online-<method>/ holds pairs-1, round-1, pairs-2, ...: folders of pairs and ordinary runs.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.generation.pairs import PairsConfig
from rmipo.recipe.files import read_yaml


@dataclass(frozen=True)
class OnlineConfig:
    """The keys of an online.yaml, which explains them. `pairs` are those of a pairs.yaml."""

    prompts_per_round: int
    pairs: dict
    held_out: str
    held_out_prompts: int
    overrides: list[dict]

    @classmethod
    def load(cls, path: Path) -> "OnlineConfig":
        """Raises ConfigError for a file that doesn't hold exactly these keys, PairsError for its pairs."""
        try:
            config = cls(**read_yaml(path))
        except TypeError as error:
            raise ConfigError(f"{path}: {error}") from error
        PairsConfig.load(config.pairs, f"{path}, pairs")
        return config


@dataclass(frozen=True)
class Round:
    """One round in the folder `home`; the first is number 1. `start`: the policy before the first."""

    config: OnlineConfig
    home: Path
    start: Path
    number: int

    @property
    def policy(self) -> Path:
        """The model that answers in this round, and that its training starts from."""
        return self.start if self.number == 1 else self.home / f"round-{self.number - 1}"

    @property
    def folder(self) -> Path:
        return self.home / f"round-{self.number}"

    @property
    def pairs(self) -> Path:
        return self.home / f"pairs-{self.number}"

    @property
    def pairs_config(self) -> PairsConfig:
        size = self.config.prompts_per_round
        own = {"skip_prompts": (self.number - 1) * size, "max_prompts": size}  # no prompt is answered twice
        return PairsConfig.load(self.config.pairs | own, f"round {self.number}")

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """What `scripts/launch.py` is told: `env` with the round's overrides under those in ARGS, which win."""
        arguments = shlex.split(env.get("ARGS", ""))
        given = {argument.partition("=")[0] for argument in arguments}
        # The last entry holds for all rounds after it.
        overrides = self.config.overrides[min(self.number, len(self.config.overrides)) - 1]
        paths = {"dataset_name": self.pairs, "model_name_or_path": self.policy, "output_dir": self.folder}
        own = [
            f"--{key}={json.dumps(value) if not isinstance(value, str | Path) else value}"
            for key, value in (overrides | paths).items()
            if f"--{key}" not in given
        ]
        # In one group W&B draws the rounds over each other.
        group = env.get("WANDB_RUN_GROUP") or f"{self.home.parent.name}-{self.home.name}"
        return {**env, "STAGE": "rmipo", "DATA": "", "ARGS": shlex.join([*own, *arguments]), "WANDB_RUN_GROUP": group}
