"""From a recipe to validated dataclasses. All that is wrong is reported at once, before a model is loaded."""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.recipe import foreign
from rmipo.recipe.arguments import LIGER
from rmipo.recipe.checks import check_types, check_values, stage_of, template_text
from rmipo.recipe.files import NO_GPU, merge, parse_overrides, read_layers
from rmipo.recipe.schema import ARGUMENTS, DataConfig, ModelConfig
from rmipo.record import recorded_run

__all__ = ["ConfigError", "DataConfig", "Recipe", "load_recipe", "parse_command_line"]
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Recipe:
    """A validated recipe: `values` are flat, merged, and of the types that the dataclasses declare."""

    path: Path
    stage: str  # "sft" or "preference"
    values: dict[str, Any]
    notices: list[str]

    @property
    def name(self) -> str:
        """Of the run, after its folder: `llama3-8b-instruct-dpo`."""
        folder = Path(self.values["output_dir"])
        return f"{folder.parent.name}-{folder.name}".lstrip("-")

    def resolved(self) -> dict[str, Any]:
        """What `run.json` records. There are no secrets in it: `load_recipe` refuses a recipe with one."""
        return copy.deepcopy(self.values)

    def batch(self, world_size: int) -> tuple[int, int]:
        """(global batch size, accumulation steps) over `world_size` processes. Raises ConfigError if there is a rest."""
        per_device = self.values.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
        if "global_batch_size" not in self.values:  # a recipe of the handbook
            steps = self.values["gradient_accumulation_steps"]
            return per_device * steps * world_size, steps
        size = self.values["global_batch_size"]
        if size % (per_device * world_size):
            factors = f"per_device_train_batch_size ({per_device}) x processes ({world_size})"
            raise ConfigError(f"{self.path}: global_batch_size {size} is not a multiple of {factors}")
        return size, size // (per_device * world_size)

    def require_stage(self, stage: str) -> "Recipe":
        """This recipe, if it is one of `stage`; else ConfigError."""
        if self.stage != stage:
            raise ConfigError(f"{self.path} is a recipe of stage {self.stage}: scripts/{self.stage}.py trains it")
        return self

    def parse(self, world_size: int | None = None) -> tuple[TrainingArguments, DataConfig, ModelConfig]:
        """The dataclasses of a real run: `PreferenceRunConfig` or TRL's `SFTConfig`, then data and model.

        `world_size` defaults to the launcher's WORLD_SIZE. `chat_template` comes back as text. Raises ConfigError.
        """
        if world_size is None:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
        global_batch_size, accumulation = self.batch(world_size)
        if torch.cuda.device_count() == 0 and not self.values.get("use_cpu"):
            raise ConfigError(f"{self.path}: {NO_GPU}")
        model = self.values["model_name_or_path"]
        if not Path(model).is_dir() and (model.count("/") > 1 or model.startswith((".", "/"))):
            raise ConfigError(f"{self.path}: model_name_or_path is {model}: no such folder. Has its stage been run?")
        values = {"run_name": self.name, **self.resolved()}  # trackers would show the name of the folder alone
        values["gradient_accumulation_steps"] = accumulation  # TRL's SFTTrainer knows no global batch
        if self.stage == "preference":  # whose trainer accumulates by itself
            values |= {"global_batch_size": global_batch_size, "gradient_accumulation_steps": 1}
        values["use_cache"] = True  # in the saved configuration, for generation; training forwards say False themselves
        if values.get("use_liger_kernel"):
            values["liger_kernel_config"] = LIGER | (values.get("liger_kernel_config") or {})
        values["chat_template"] = template_text(values.get("chat_template"))
        # `export.push` uploads; under the default strategy the Trainer would upload each checkpoint as it is.
        values |= {"hub_strategy": "end", "hub_private_repo": values.get("hub_private_repo", True)}

        if values.get("use_cpu"):
            # Without GPUs TrainingArguments leaves this timeout out. Processes connect here; it finds them connected.
            PartialState(cpu=True, timeout=timedelta(seconds=values.get("ddp_timeout", TrainingArguments.ddp_timeout)))

        def build(cls: type) -> Any:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

        try:
            return build(ARGUMENTS[self.stage]), build(DataConfig), build(ModelConfig)
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.path}: {error}") from error


def load_recipe(path: str | Path, overlays: Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay overlays and overrides over it, and check all that needs neither data nor model.

    Args:
        overlays: YAML files merged over it in turn. A block `per_setting` holds values for single settings, which are
            named after the recipe's folder.
        overrides: `["--learning_rate", "1e-6", "--objective.beta=2.5"]`.

    Raises ConfigError that lists everything that is wrong.
    """
    path = Path(path)
    values, notices, problems, origin = {}, [], [], {}
    for number, (source, layer) in enumerate(_layers(path, overlays, overrides)):
        try:
            layer, layer_notices = foreign.translate(layer, is_recipe=number == 0)
        except ValueError as error:
            problems += [f"{source}: {line}" for line in str(error).split("\n")]
            continue
        notices += layer_notices
        # So that a message can name the file that set a key.
        origin |= dict.fromkeys(layer, source)
        values = merge(values, layer)
    notices += _left_out(path, overlays) if not problems else []
    if "prefer_local" in values:
        notices.append(_take_local(values))
    # For small models: a GPU where there is one.
    if values.get("use_cpu") == "auto":
        values["use_cpu"] = torch.cuda.device_count() == 0
    # From the merged keys: an overlay may be what makes it a preference recipe.
    stage = stage_of(values)
    type_problems, sound = check_types(values, stage, origin)
    complete = not problems  # otherwise keys would be called missing that a layer has
    problems += type_problems + (check_values(values, sound, stage) if complete else [])
    if problems:
        raise ConfigError("\n  ".join([f"{path} can't be used:", *problems]))
    return Recipe(path, stage, sound, notices)


def parse_command_line(description: str) -> tuple[str, list[str], list[str]]:
    """(recipe, overlays, overrides) of a training script's command line: the arguments of `load_recipe`."""
    parser = cli.options(description)
    parser.add_argument("--config", required=True, help="recipe, e.g. recipes/tiny/rmipo.yaml")
    parser.add_argument("--overlay", action="append", default=[], help="YAML merged over the recipe; repeatable")
    known, overrides = parser.parse_known_args()
    return known.config, known.overlay, overrides


def _layers(path: Path, overlays: Iterable[str | Path], overrides: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """(source, values) of each layer, lowest first. Raises ConfigError for what can't be read."""
    setting = path.resolve().parent.name
    for source in (path, *overlays):
        for file, layer in read_layers(source):
            own = (layer.pop("per_setting", None) or {}).get(setting)
            yield file, layer
            yield file, own or {}
    try:
        yield COMMAND_LINE, parse_overrides(overrides)
    except ValueError as error:
        raise ConfigError(f"{COMMAND_LINE}: {error}") from error


def _left_out(path: Path, overlays: Iterable[str | Path]) -> list[str]:
    """A notice for each overlay with values for the setting that the recipe builds on, and none for its own."""
    setting, *bases = [Path(file).resolve().parent.name for file, _ in reversed(read_layers(path))]
    notices = []
    for overlay in overlays:
        for file, layer in read_layers(overlay):
            for_settings = layer.get("per_setting") or {}
            base = next((name for name in bases if name in for_settings), None)
            if base and setting not in for_settings:
                keys = ", ".join(for_settings[base])
                notices.append(f"{file}: its values for {base} ({keys}) do not apply to {setting}; the common ones do")
    return notices


def _take_local(values: dict[str, Any]) -> str:
    """Put this repository's own checkpoint in place of the public one if it is finished. Returns the notice."""
    local, public = values.pop("prefer_local"), values.get("model_name_or_path")
    run = recorded_run(local) if local else None
    if run is None or not run["finished"]:
        return f"model_name_or_path: {public}, because {local} holds no finished run"
    values["model_name_or_path"] = local
    values.pop("model_revision", None)
    return f"model_name_or_path: {local}, this repository's own run, in place of {public}"
