"""The programs behind `make train`: which stages a setting has, their command lines, and whether they were run before.

Paths are relative to the root of the repository, which is the working directory.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.launch.choices import MADE_FIRST, choose_method, choose_stages, split_args
from rmipo.recipe.load import Recipe, load_recipe
from rmipo.record import recorded_run
from rmipo.run.identity import differences

SCRIPTS = {
    "world": "toy.py",
    "weights": "weights.py",
    "pairs": "pairs.py",
    "sft": "sft.py",
    "rmipo": "preference.py",
    "report": "toy_report.py",
}


@dataclass
class Step:
    """One program to run, with the recipe that it trains, if it trains one."""

    stage: str
    arguments: list[str] = field(default_factory=list)
    recipe: Recipe | None = None

    @property
    def program(self) -> list[str]:
        return [f"scripts/{SCRIPTS[self.stage]}", *self.arguments]

    @property
    def on_cpu(self) -> bool:
        return self.recipe is None or bool(self.recipe.values.get("use_cpu"))

    def is_launched(self, sharding: str | None) -> bool:
        """Whether several processes train it: on GPUs, and on a CPU where SHARDING is given, to try that without GPUs."""
        return self.recipe is not None and bool(sharding or not self.on_cpu)

    def processes(self, gpus: int, nodes: int = 1, sharding: str | None = None) -> int:
        """Over `nodes` machines of `gpus` GPUs; on the CPU one each."""
        return nodes * gpus if self.is_launched(sharding) else nodes

    def command(self, gpus: int, sharding: str | None) -> list[str]:
        """The command line here: `accelerate launch` on `gpus` GPUs, or plain Python for what one process runs on the CPU."""
        programs = Path(os.path.relpath(Path(sys.executable).parent))
        if not self.is_launched(sharding):
            return [str(programs / "python"), *self.program]
        config = str(launch_configuration(self.recipe, sharding))
        launch = [str(programs / "accelerate"), "launch", "--config_file", config, "--num_processes", str(gpus)]
        return [*launch, *self.program]

    def job(self, gpus: int, nodes: int, sharding: str | None) -> dict:
        """The same as a Slurm job, named after the folder it writes: the arguments of `slurm.sbatch_command`."""
        config = "cpu" if self.on_cpu else str(launch_configuration(self.recipe, sharding))
        job = {"config": config, "program": self.program, "nodes": nodes, "gpus": 0 if self.on_cpu else gpus}
        return {**job, "name": self.recipe.name}

    def check(self, gpus: int, nodes: int = 1, sharding: str | None = None) -> None:
        """Raises ConfigError if the recipe can't be trained on `nodes` machines of `gpus` GPUs."""
        if self.recipe is not None:
            self.recipe.require_device(gpus)
            self.recipe.batch(self.processes(gpus, nodes, sharding))

    def is_done(self) -> bool:
        """Whether this very run has finished.

        Raises:
            ConfigError: its folder holds a run of another recipe; names what differs.
        """
        folder = self.recipe.values["output_dir"]
        run = recorded_run(folder)
        if run is None:
            return False
        here = json.loads(json.dumps(self.recipe.resolved(), default=str))
        differing = differences({"recipe": run.get("recipe")}, {"recipe": here})
        if differing:
            remedy = f"Name another folder (ARGS='--output_dir ...') or remove {folder}"
            raise ConfigError(
                "\n  ".join([f"{folder} holds a run of another recipe. {remedy}. Different:", *differing])
            )
        return run["finished"]

    def needs_no_start(self) -> bool:
        """Whether it has finished and has nothing to upload: a finished run that is started again only uploads."""
        return self.is_done() and not self.recipe.values.get("push_to_hub")


def launch_configuration(recipe: Recipe, name: str | None = None) -> Path:
    """The file of configs/accelerate/ that a recipe is launched with: adapters need nothing sharded."""
    default = "ddp" if recipe.values.get("use_peft") else "zero3"
    return Path(f"configs/accelerate/{name or default}.yaml")


def load_steps(model: str, stages: list[str], env: Mapping[str, str]) -> list[Step]:
    """The programs of `stages`. METHOD belongs to the preference stage, ARGS to the last recipe that is run.

    A run's folder is outputs/<model>/<sft or method>, and tells other data and adapters apart.
    DATA replaces the pairs of the preference stage. A setting that is made from scratch (with a world.yaml) is then made
    from those pairs altogether: tokenizer, SFT on the chosen responses, with the values of `with-data/<stage>.yaml`.
    """
    last = [stage for stage in stages if stage in ("sft", "rmipo")][-1]
    data, suffix = env.get("DATA", ""), ""
    if data:
        suffix = "-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(data).name.split(".")[0]).strip("-")
    world = f"outputs/{model}/world{suffix}" if Path(f"recipes/{model}/world.yaml").is_file() else None
    steps = []
    for stage in stages:
        path = f"recipes/{model}/{stage}.yaml"
        if stage == "world":
            steps.append(Step(stage, ["--config", path, "--output", world, *(["--data", data] if data else [])]))
            continue
        if stage == "weights":
            steps.append(Step(stage, ["--config", path, "--output", f"outputs/{model}/weights"]))
            continue
        if stage == "pairs":
            output = ["--output", f"outputs/{model}/pairs"]
            steps.append(Step(stage, ["--model", model, "--method", "initial", *output, "--keep"]))
            continue
        if stage == "report":
            steps.append(Step(stage, ["--run", steps[-1].recipe.values["output_dir"], "--world", world]))
            continue
        overlays, overrides = [], {}
        if data and world:
            overlays.append(f"recipes/{model}/with-data/{stage}.yaml")
            start = f"{world}/model" if stage == "sft" else f"outputs/{model}/sft{suffix}"
            overrides["--model_name_or_path"] = start
        if data:
            overrides["--dataset_name"] = f"{world}/sft" if world and stage == "sft" else data
        name = stage
        if stage == "rmipo":
            name, overlay = choose_method(env)
            overlays += overlay
        more_overlays, arguments = split_args(env) if stage == last else ([], [])
        overlays += more_overlays
        adapters = [path.stem for path in map(Path, overlays) if path.parent.name == "adapters"]
        folder = "-".join([f"{name}{suffix}", *adapters])
        if folder != stage:
            overrides["--output_dir"] = f"outputs/{model}/{folder}"
        given = {argument.partition("=")[0] for argument in arguments}
        arguments = [text for key in overrides if key not in given for text in (key, overrides[key])] + arguments
        recipe = load_recipe(path, overlays, arguments)
        overlay_arguments = [text for overlay in overlays for text in ("--overlay", overlay)]
        steps.append(Step(stage, ["--config", path, *overlay_arguments, *arguments], recipe))
    for stage, key in (("weights", "model_name_or_path"), ("pairs", "dataset_name")):
        if stage in stages and steps[-1].recipe.values.get(key) != f"outputs/{model}/{stage}":
            steps = [step for step in steps if step.stage != stage]
    return steps


def maker(path: str, model: str, env: Mapping[str, str]) -> str | None:
    """The command that makes a model or data at `path`, if an earlier stage of this setting does."""
    given = {"DATA": env["DATA"]} if env.get("DATA") else {}
    data = [f"{name}={value}" for name, value in given.items()]
    for step in load_steps(model, choose_stages({"MODEL": model})[1], given):
        if step.stage in MADE_FIRST:
            folder, command = step.arguments[step.arguments.index("--output") + 1], step.command(0, None)
        elif step.stage == "sft":
            folder, command = step.recipe.values["output_dir"], ["make", "train", f"MODEL={model}", "STAGE=sft", *data]
        else:
            continue
        if Path(path).is_relative_to(folder):
            return shlex.join(command)
    return None
