"""The programs behind `make train`: which stages a setting has, their command lines, and whether they were run before.

Paths are relative to the root of the repository, which is the working directory.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rmipo.recipe.load import ConfigError, Recipe, load_recipe
from rmipo.record import recorded_run
from rmipo.run.identity import differences

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "world": "toy.py",
    "weights": "weights.py",
    "sft": "sft.py",
    "rmipo": "preference.py",
    "report": "toy_report.py",
}
MADE_FIRST = ("world", "weights")  # what a setting makes before its first training
NOT_SETTINGS = {"ablations", "adapters", "methods", "sweeps", "templates"}


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

    def processes(self, gpus: int, nodes: int = 1) -> int:
        """Over `nodes` machines of `gpus` GPUs; on the CPU one each."""
        return nodes if self.on_cpu else nodes * gpus

    def command(self, gpus: int, sharding: str | None) -> list[str]:
        """The command line here: `accelerate launch` on `gpus` GPUs, or plain Python for what runs on the CPU."""
        programs = Path(os.path.relpath(Path(sys.executable).parent))
        if self.on_cpu:
            return [str(programs / "python"), *self.program]
        config = os.path.relpath(launch_configuration(self.recipe, sharding))
        launch = [str(programs / "accelerate"), "launch", "--config_file", config, "--num_processes", str(gpus)]
        return [*launch, *self.program]

    def job(self, gpus: int, nodes: int, sharding: str | None) -> dict:
        """The same as a Slurm job, named after the folder it writes: the arguments of `slurm.sbatch_command`."""
        config = "cpu" if self.on_cpu else os.path.relpath(launch_configuration(self.recipe, sharding))
        job = {"config": config, "program": self.program, "nodes": nodes, "gpus": 0 if self.on_cpu else gpus}
        return {**job, "name": self.recipe.name}

    def check(self, gpus: int, nodes: int = 1) -> None:
        """Raises ConfigError if the recipe can't be trained on `nodes` machines of `gpus` GPUs."""
        if self.recipe is not None:
            self.recipe.require_device(gpus)
            self.recipe.batch(self.processes(gpus, nodes))

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


def launch_configuration(recipe: Recipe, name: str | None = None) -> Path:
    """The file of configs/accelerate/ that a recipe is launched with: adapters need nothing sharded."""
    default = "ddp" if recipe.values.get("use_peft") else "zero3"
    return ROOT / f"configs/accelerate/{name or default}.yaml"


def choose(variable: str, value: str, options: list[str], title: str) -> str:
    """`value` if it is one of `options`, else ConfigError with all of them."""
    if value in options:
        return value
    found = f"{variable}={value!r} is not one of them" if value else f"{variable} is not set"
    raise ConfigError("\n  ".join([f"{found}. {title}:", *options]))


def node_count(env: Mapping[str, str]) -> int:
    """NODES, default 1. Raises ConfigError for what is no number of machines."""
    given = env.get("NODES") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"NODES={given!r}: expected the number of machines, such as NODES=4")
    return int(given)


def choose_sharding(env: Mapping[str, str]) -> str:
    """SHARDING, empty if it is not set. Raises ConfigError unless it is a file of configs/accelerate/."""
    name = env.get("SHARDING", "")
    if name:
        choose("SHARDING", name, list(named_files("configs/accelerate")), "Files in configs/accelerate")
    return name


def named_files(*folders: str) -> dict[str, str]:
    """name -> path of the YAML files in `folders`."""
    return {path.stem: str(path) for folder in folders for path in sorted(Path(folder).glob("*.yaml"))}


def choose_stages(env: Mapping[str, str]) -> tuple[str, list[str]]:
    """(setting, its stages in order) as MODEL and STAGE ask for them."""
    folders = sorted({path.parent.name for name in ("sft", "rmipo") for path in Path("recipes").glob(f"*/{name}.yaml")})
    model = choose(
        "MODEL", env.get("MODEL", ""), [name for name in folders if name not in NOT_SETTINGS], "The settings"
    )
    present = [s for s in (*MADE_FIRST, "sft", "rmipo") if Path(f"recipes/{model}/{s}.yaml").is_file()]
    trained = [stage for stage in present if stage not in MADE_FIRST]
    stage = choose("STAGE", env.get("STAGE") or "all", [*trained, "all"], f"The stages of {model}")
    stages = present if stage == "all" else [name for name in present if name in (*MADE_FIRST, stage)]
    return model, stages + ["report"] * ("world" in present and "rmipo" in stages)


def load_steps(model: str, stages: list[str], env: Mapping[str, str]) -> list[Step]:
    """The programs of `stages`. METHOD belongs to the preference stage, ARGS to the last recipe that is run.

    A run's folder is outputs/<model>/<sft or method>, and tells other data and adapters apart.
    DATA replaces the pairs of the preference stage. A setting that is made from scratch (with a world.yaml) is then made
    from those pairs altogether: tokenizer, SFT on the chosen responses, with the values of `with-data/<stage>.yaml`.
    """
    last = [stage for stage in stages if stage in ("sft", "rmipo")][-1]
    data, suffix = os.path.expanduser(env.get("DATA", "")), ""
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
            name, overlay = _method(env)
            overlays += overlay
        more_overlays, arguments = _split_args(env.get("ARGS", "")) if stage == last else ([], [])
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
    if "weights" in stages and steps[-1].recipe.values["model_name_or_path"] != f"outputs/{model}/weights":
        steps = [step for step in steps if step.stage != "weights"]
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


def _method(env: Mapping[str, str]) -> tuple[str, list[str]]:
    """(name, overlays) that METHOD stands for."""
    methods = named_files("recipes/methods", "recipes/ablations")
    name = choose("METHOD", env.get("METHOD") or "rmipo", ["rmipo", *methods], "The methods and ablations")
    return name, [] if name == "rmipo" else [methods[name]]


def _split_args(text: str) -> tuple[list[str], list[str]]:
    """(overlays, overrides) in ARGS."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--overlay", action="append", default=[])
    try:
        known, overrides = parser.parse_known_args(shlex.split(text))
    except (ValueError, argparse.ArgumentError) as error:
        raise ConfigError(f"ARGS={text!r} can't be read: {error}") from error
    return known.overlay, overrides
