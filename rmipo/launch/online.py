"""`make online`: sample, score, pair and train, round after round, each from the policy of the round before.

outputs/<model>/online-<method>/ holds pairs-1, round-1, pairs-2, ...: folders of pairs and ordinary runs.
"""

import json
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.generation.pairs import PairsConfig
from rmipo.launch.pipeline import load_steps
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
    """One round of `model` with `method`; the first is number 1. `start`: the policy before the first."""

    config: OnlineConfig
    model: str
    method: str
    start: Path
    number: int
    outputs: Path = Path("outputs")

    @property
    def home(self) -> Path:
        return self.outputs / self.model / f"online-{self.method}"

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
        own = {"skip_prompts": (self.number - 1) * size, "max_prompts": size}
        return PairsConfig.load(self.config.pairs | own, f"round {self.number}")

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """What `scripts/launch.py` is told; ARGS in `env` lie over the overrides of online.yaml."""
        arguments = shlex.split(env.get("ARGS", ""))
        given = {argument.partition("=")[0] for argument in arguments}
        values = self.config.overrides[min(self.number, len(self.config.overrides)) - 1] | {
            "dataset_name": str(self.pairs),
            "model_name_or_path": str(self.policy),
            "output_dir": str(self.folder),
        }
        own = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
            if f"--{key}" not in given
        ]
        setting = {"MODEL": self.model, "METHOD": self.method, "STAGE": "rmipo", "DATA": ""}
        group = env.get("WANDB_RUN_GROUP") or f"{self.model}-online-{self.method}"
        return {**env, **setting, "ARGS": shlex.join([*own, *arguments]), "WANDB_RUN_GROUP": group}

    def check(self, env: Mapping[str, str]) -> None:
        """Raises ConfigError if the round's recipe is wrong: before anything is sampled."""
        load_steps(self.model, ["rmipo"], self.environment(env))


def make_first(model: str) -> None:
    """Make a setting's weights if they come from the package index and aren't there. Raises ConfigError if that fails."""
    if not Path(f"recipes/{model}/weights.yaml").is_file() or Path(f"outputs/{model}/weights/weights.json").is_file():
        return
    for step in load_steps(model, ["weights", "rmipo"], {}):
        if step.stage == "weights" and subprocess.run(step.command(0), check=False).returncode:
            raise ConfigError(f"the weights of {model} couldn't be made, see above")
