"""What is compared: the runs and the recipe of each."""

import functools
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from rmipo.compare.tasks import PairsTask, task_of
from rmipo.compare.trial import FLOOR, INITIAL, Trial
from rmipo.launch.pipeline import load_steps
from rmipo.recipe.load import ConfigError, Recipe


@dataclass(frozen=True)
class Study:
    """What all runs have in common. `arguments` are overrides of every recipe."""

    model: str
    arguments: str = ""

    def recipe(self, run: Trial, folder: str | Path = "unused") -> Recipe:
        """The recipe of the setting with the method's overlay, as this run trains it.

        Raises:
            ConfigError: something in it is wrong.
        """
        own = {"output_dir": folder, "reference_cache_dir": folder, "seed": run.seed, "eval_strategy": "no"}
        own |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": "true"}
        if run.learning_rate is not None:
            own["learning_rate"] = f"{run.learning_rate:g}"
        own |= {f"objective.{name}": f"{value:g}" for name, value in run.objective}
        arguments = f"{self.arguments} {shlex.join(f'--{key}={value}' for key, value in own.items())}"
        method = "rmipo" if run.method in (INITIAL, FLOOR) else run.method
        env = {"METHOD": method, "ARGS": arguments}
        return load_steps(self.model, ["rmipo"], env)[0].recipe

    @functools.cached_property
    def base(self) -> Recipe:
        """RMiPO's, for what all runs share: initial weights, data, device."""
        return self.recipe(Trial("report", "rmipo", None, 0, 0.0))

    @functools.cached_property
    def task(self) -> PairsTask:
        return task_of(self.model, self.base)

    @property
    def swaps_labels(self) -> bool:
        """Whether a run's noise swaps labels: those of the world, which its own pairs alone have."""
        return self.base.values.get("dataset_name") == f"outputs/{self.model}/world/pairs"

    @property
    def workers(self) -> int:
        """Programs at a time: one for each CPU core; on a GPU one, which needs all of it and is timed by the clock."""
        return os.cpu_count() if self.base.values.get("use_cpu") else 1

    def check(self, run: Trial) -> None:
        """Raises ConfigError for a wrong recipe, and for one that is meant for several GPUs (it says nothing of a CPU)."""
        if "use_cpu" not in self.recipe(run).values:
            raise ConfigError(
                f"MODEL={self.model}: make compare trains each run in one process, which tiny and smollm2-135m-instruct "
                f"are small enough for. Here, make sweep MODEL={self.model} METHOD=... searches, make train and make table "
                "compare"
            )
