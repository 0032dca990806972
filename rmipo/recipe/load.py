"""From a recipe to validated dataclasses. All that is wrong is reported at once, before a model is loaded."""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.objectives import build_objective
from rmipo.recipe import foreign
from rmipo.recipe.files import NO_GPU, merge, nearest, parse_overrides, read_layers, typed
from rmipo.recipe.schema import (
    ARGUMENTS,
    FULL_EVAL,
    RECIPE_ONLY,
    UNUSABLE,
    DataConfig,
    ModelConfig,
    PreferenceRunConfig,
    of_recipe,
)
from rmipo.record import recorded_run

# Keys of the libraries that would be ignored in silence, change the batch, or be saved and sent to trackers as a secret.
REFUSED = {"hub_token", "auto_find_batch_size", "resume_from_checkpoint", *FULL_EVAL}


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

    def parse(self, world_size: int | None = None) -> tuple[TrainingArguments, DataConfig, ModelConfig]:
        """The dataclasses of a real run: `PreferenceRunConfig` or TRL's `SFTConfig`, then data and model.

        `world_size` defaults to the launcher's WORLD_SIZE. `chat_template` comes back as text. Raises ConfigError.
        """
        size, accumulation = self.batch(world_size or int(os.environ.get("WORLD_SIZE", "1")))
        if torch.cuda.device_count() == 0 and not self.values.get("use_cpu"):
            raise ConfigError(f"{self.path}: {NO_GPU}")
        # Trackers would show the name of the folder alone.
        values = {"run_name": self.name, "hub_private_repo": True} | self.resolved()
        # `export.push` uploads; under the default strategy the Trainer would upload each checkpoint as it is.
        values |= {"hub_strategy": "end", "chat_template": template_text(values.get("chat_template"))}
        values["use_cache"] = True  # in the saved configuration, for generation; training forwards say False themselves
        values["global_batch_size"] = size
        # TRL's SFTTrainer knows no global batch. Ours accumulates by itself.
        values["gradient_accumulation_steps"] = accumulation if self.stage == "sft" else 1
        if values.get("use_cpu"):
            # Without GPUs TrainingArguments leaves this timeout out. Processes connect here; it finds them connected.
            PartialState(cpu=True, timeout=timedelta(seconds=values.get("ddp_timeout", TrainingArguments.ddp_timeout)))
        try:
            return tuple(of_recipe(cls, values) for cls in (ARGUMENTS[self.stage], DataConfig, ModelConfig))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.path}: {error}") from error


def load_recipe(path: str | Path, overlays: Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay overlays and overrides over it, and check all that needs neither data nor model.

    `overlays` are YAML files; their block `per_setting` holds values for recipes in the folders that it names. `overrides`
    are as in `["--learning_rate", "1e-6", "--objective.beta=2.5"]`. Raises ConfigError that lists everything that is wrong.
    """
    path, values, notices, origin = Path(path), {}, [], {}
    layers = [layer for file in (path, *overlays) for layer in read_layers(file)]
    for source, layer in [*layers, ("command line", parse_overrides(overrides))]:
        for_settings = layer.pop("per_setting", None) or {}
        try:
            layer, translated = foreign.translate(layer)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{source}: not in a form that is known here: {error!r}") from error
        notices += translated
        for part in (layer, for_settings.get(path.resolve().parent.name) or {}):
            origin |= dict.fromkeys(part, source)  # so that a message can name the file that set a key
            values = merge(values, part)
    if local := values.pop("prefer_local", None):
        finished = (recorded_run(local) or {}).get("finished")
        if finished:
            values["model_name_or_path"] = local
            values.pop("model_revision", None)
        why = f"because {local} holds {'a' if finished else 'no'} finished run"
        notices.append(f"model_name_or_path: {values['model_name_or_path']}, {why}")
    # For small models: a GPU where there is one.
    if values.get("use_cpu") == "auto":
        values["use_cpu"] = torch.cuda.device_count() == 0
    # From the merged keys: an overlay may be what makes it a preference recipe.
    stage = "preference" if "objective" in values else "sft"
    sound, problems = check_types(values, stage, origin)
    problems += check_values(values, sound, stage)
    if problems:
        raise ConfigError("\n  ".join([f"{path} can't be used:", *problems]))
    return Recipe(path, stage, sound, notices)


def recipe_of_command_line(description: str, stage: str) -> Recipe:
    """The recipe that a training script's command line names. Raises ConfigError unless it is one of `stage`."""
    parser = cli.options(description)
    parser.add_argument("--config", required=True, help="recipe, e.g. recipes/tiny/rmipo.yaml")
    parser.add_argument("--overlay", action="append", default=[], help="YAML merged over the recipe; repeatable")
    known, overrides = parser.parse_known_args()
    recipe = load_recipe(known.config, known.overlay, overrides)
    if recipe.stage != stage:
        raise ConfigError(f"{recipe.path} is a recipe of stage {recipe.stage}: scripts/{recipe.stage}.py trains it")
    return recipe


def check_types(values: dict[str, Any], stage: str, origin: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values of the types that the dataclasses declare; a line for each other one, with the file in `origin` that has it."""
    types = dict(RECIPE_ONLY)
    for cls in (ARGUMENTS[stage], DataConfig, ModelConfig):
        types |= get_type_hints(cls, include_extras=True)
    refused = REFUSED.union(UNUSABLE if stage == "preference" else ())
    sound, problems = {}, []
    for key, value in values.items():
        no = value is False and key.endswith("_strategy")  # what transformers calls "no" is false in YAML
        try:
            if key not in types:
                raise ConfigError(f"{origin[key]}: {key} is not a key of {stage} recipes{nearest([key], types)}")
            if key in refused and value:  # false asks for what happens anyway
                raise ConfigError(f"{origin[key]}: {key} can't be set in recipes")
            sound[key] = typed(types[key], "no" if no else value, f"{origin[key]}: {key}")
        except ConfigError as error:
            if value is not None:  # null takes back what a layer below says
                problems.append(str(error))
    return sound, problems


def check_values(given: dict[str, Any], values: dict[str, Any], stage: str) -> list[str]:
    """A line for each key missing in `given`, and each contradiction in `values`, those of the right type."""
    # A key whose value has a wrong type is named already: it is not missing.
    problems = [f"{key} is missing" for key in ("model_name_or_path", "output_dir") if not given.get(key)]
    for keys in (("global_batch_size", "gradient_accumulation_steps"), ("dataset_name", "datasets")):
        if bool(given.get(keys[0])) == bool(given.get(keys[1])):
            problems.append(f"{' and '.join(keys)}: set one of them, and not both")
    lora = [key for key in values if key.startswith(("lora_", "use_rslora", "use_dora"))]
    if lora and not values.get("use_peft"):
        problems.append(f"{', '.join(lora)}: all weights would be trained without use_peft: true")
    if len({entry.get("fraction") is None for entry in values.get("datasets", ())}) > 1:
        problems.append("datasets: fraction must be set for every dataset of the mixture or for none")
    checks = [(template_text, values.get("chat_template"))]
    if stage == "preference":
        checks.append((build_objective, values.get("objective")))
        length = values.get("max_length", PreferenceRunConfig.max_length)
        if values.get("max_prompt_length", PreferenceRunConfig.max_prompt_length) >= length:
            problems.append(f"max_prompt_length: expected less than max_length ({length})")
    for check, value in checks:
        try:
            check(value)
        except ValueError as error:
            problems.append(str(error))
    return problems


def template_text(template: str | None) -> str | None:
    """The chat template itself, read from its file if `template` is a path. Raises ConfigError if it is neither."""
    if template is None or "{%" in template or "{{" in template:
        return template
    try:
        return Path(template).read_text()
    except OSError as error:
        raise ConfigError(f"chat_template is {template!r}, neither template text nor a file: {error}") from error
