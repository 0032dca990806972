"""What is compared: the runs, the recipe of each, its training pairs, and the half of the held-out data it meets."""

import copy
import functools
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset

from rmipo.data.pairs import load_pairs
from rmipo.launch.pipeline import load_steps
from rmipo.objectives import OBJECTIVES
from rmipo.recipe.load import ConfigError, Recipe
from rmipo.tiny.files import RECORD, read_world
from rmipo.tiny.world import World

INITIAL, FLOOR = "initial", "sft-chosen"  # the SFT model itself, and more SFT on the chosen responses
METHODS = ("rmipo", *(name for name in OBJECTIVES if name != "rmipo"), FLOOR)
SEARCH_SEED = 1000  # pairs and order of the search; no reported run has them


@dataclass(frozen=True)
class Run:
    """One training: which method, how, on which draw of the pairs; `purpose` is "search" or "report"."""

    purpose: str
    method: str
    learning_rate: float | None
    seed: int
    noise: float  # share of the training pairs whose labels are swapped

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f" lr {self.learning_rate:g}"
        return f"{self.method}{rate} seed {self.seed} noise {self.noise:g}"


@dataclass(frozen=True)
class Study:
    """What all runs have in common. `arguments` are overrides of every recipe, `data` pairs in place of the world's."""

    model: str
    data: str = ""
    arguments: str = ""

    def recipe(self, run: Run, folder: str | Path = "unused") -> Recipe:
        """The recipe of the setting with the method's overlay, as this run trains it.

        Raises:
            ConfigError: something in it is wrong.
        """
        own = {"output_dir": folder, "reference_cache_dir": folder, "seed": run.seed, "eval_strategy": "no"}
        own |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": "true"}
        if run.learning_rate is not None:
            own["learning_rate"] = f"{run.learning_rate:g}"
        arguments = f"{self.arguments} {shlex.join(f'--{key}={value}' for key, value in own.items())}"
        method = run.method if run.method in OBJECTIVES else "rmipo"
        env = {"METHOD": method, "DATA": self.data, "ARGS": arguments}
        return load_steps(self.model, ["rmipo"], env)[0].recipe

    @functools.cached_property
    def world(self) -> World | None:
        """The world whose pairs are trained on; None on other pairs."""
        folder = Path(self.recipe(Run("report", "rmipo", None, 0, 0.0)).values.get("dataset_name", "")).parent
        return read_world(folder) if (folder / RECORD).exists() else None

    @property
    def selection_metric(self) -> str:
        return "preference_accuracy" if self.world is None else "right_probability"

    def check(self, run: Run) -> None:
        """Raises ConfigError for a wrong recipe, and for one that is not trained on the CPU."""
        if not self.recipe(run).values.get("use_cpu"):
            raise ConfigError(
                f"MODEL={self.model}: make compare trains on the CPU, which tiny is meant for. "
                f"Here, make sweep MODEL={self.model} METHOD=... searches, make train and make table compare"
            )


def train_pairs(study: Study, recipe: Recipe, run: Run) -> Dataset:
    """The training pairs as messages. Of the world, every seed draws its own; other pairs are the same for all."""
    if study.world is None:
        return load_pairs(recipe.parse(world_size=1)[1], "train")
    drawn = copy.copy(study.world)  # the same facts, other questions and answers
    drawn.config = replace(drawn.config, seed=drawn.config.seed + 1 + run.seed, label_noise=run.noise)
    return numbered(drawn.pairs("train"))


def held_out(study: Study, recipe: Recipe, run: Run) -> tuple[list, Dataset]:
    """(questions, pairs) of the half that is for this run's purpose; facts and prompts are in one half only."""
    if study.world is None:
        pairs = load_pairs(recipe.parse(world_size=1)[1], "test")
        prompts = sorted({json.dumps(prompt) for prompt in pairs["prompt"]})
        mine = set(half(prompts, run.purpose))
        return [], pairs.select([i for i, prompt in enumerate(pairs["prompt"]) if json.dumps(prompt) in mine])
    facts = list(dict.fromkeys(question.fact for question in study.world.held_out_questions))
    mine = set(half(facts, run.purpose))
    questions = [question for question in study.world.held_out_questions if question.fact in mine]
    asked = [question.prompt for question in questions]
    return questions, numbered(row for row in study.world.pairs("test") if row["prompt"] in asked)


def half(values: list, purpose: str) -> list:
    return values[: len(values) // 2] if purpose == "search" else values[len(values) // 2 :]


def numbered(rows: Iterable[dict]) -> Dataset:
    sides = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{**{side: row[side] for side in sides}, "row": i} for i, row in enumerate(rows)])
