"""From a recipe to validated dataclasses. All that is wrong is reported at once, before a model is loaded."""

import copy
import difflib
import glob
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import TrainingArguments

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.objectives import OBJECTIVES, build_objective
from rmipo.recipe import foreign
from rmipo.recipe.arguments import LIGER, UNUSABLE
from rmipo.recipe.files import NO_GPU, coerce, merge, parse_overrides, read_layers
from rmipo.recipe.schema import (
    ARGUMENTS,
    RECIPE_ONLY,
    DataConfig,
    ModelConfig,
    PreferenceRunConfig,
    SFTConfig,
    of_recipe,
)
from rmipo.record import recorded_run

__all__ = ["ConfigError", "DataConfig", "Recipe", "load_recipe", "parse_command_line"]
COMMAND_LINE = "command line"
# Keys of the libraries that would be ignored in silence, or spoil a run, and what to do in their place.
REFUSED = {
    "hub_token": "log in with `.venv/bin/hf auth login` or set HF_TOKEN: recipes are saved beside models and sent to trackers",
    "chat_template_path": "use chat_template",
    "auto_find_batch_size": "it would change the batch size behind global_batch_size",
    "resume_from_checkpoint": "the same command goes on from its last complete checkpoint",
    "bf16_full_eval": UNUSABLE["bf16_full_eval"],
    "fp16_full_eval": UNUSABLE["fp16_full_eval"],
}
REFUSED_IN_PREFERENCE = UNUSABLE | {"attn_implementation": "packed pairs have their own kernels: use attention"}
# Recipes are saved beside models, logged and sent to trackers.
ACCESS_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|wandb_v1_\w+)")
ADAPTERS = ("lora_", "use_rslora", "use_dora")  # how keys begin that only adapters read
# Numbers that the libraries take and that would train nothing, train without clipping, or save nothing, without a word.
MEANINGFUL = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "save_steps"), PositiveFloat),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), PositiveInt),
    **dict.fromkeys(("gradient_accumulation_steps", "max_prompt_length", "lora_r", "lora_alpha"), PositiveInt),
    **dict.fromkeys(("max_grad_norm", "weight_decay"), NonNegativeFloat),
    **dict.fromkeys(("max_tokens_per_micro_batch", "max_length"), PositiveInt | None),
    "eval_steps": PositiveFloat | None,
    "generation_samples": NonNegativeInt,
}


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

        try:
            return tuple(of_recipe(cls, values) for cls in (ARGUMENTS[self.stage], DataConfig, ModelConfig))
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
    values, notices, problems, origin, left_out = {}, [], [], {}, []
    for number, (source, layer) in enumerate(_layers(path, overlays, overrides, left_out)):
        try:
            layer, layer_notices = foreign.translate(layer, is_recipe=number == 0)
        except ValueError as error:
            problems += [f"{source}: {line}" for line in str(error).split("\n")]
            continue
        notices += layer_notices
        # So that a message can name the file that set a key.
        origin |= dict.fromkeys(layer, source)
        values = merge(values, layer)
    notices += left_out
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


def _layers(
    path: Path, overlays: Iterable[str | Path], overrides: Sequence[str], left_out: list[str]
) -> Iterator[tuple[str, dict]]:
    """(source, values) of each layer, lowest first. Raises ConfigError for what can't be read.

    `left_out` gets a notice for each overlay with values for the setting that the recipe builds on, and none for its own.
    """
    setting, *bases = [Path(file).resolve().parent.name for file, _ in reversed(read_layers(path))]
    for source in (path, *overlays):
        for file, layer in read_layers(source):
            for_settings = layer.pop("per_setting", None) or {}
            yield file, layer
            yield file, for_settings.get(setting) or {}
            base = next((name for name in bases if name in for_settings), None)
            if base and setting not in for_settings:
                keys = ", ".join(for_settings[base])
                left_out.append(f"{file}: its values for {base} ({keys}) do not apply to {setting}; the common ones do")
    try:
        yield COMMAND_LINE, parse_overrides(overrides)
    except ValueError as error:
        raise ConfigError(f"{COMMAND_LINE}: {error}") from error


def _take_local(values: dict[str, Any]) -> str:
    """Put this repository's own checkpoint in place of the public one if it is finished. Returns the notice."""
    local, public = values.pop("prefer_local"), values.get("model_name_or_path")
    run = recorded_run(local) if local else None
    if run is None or not run["finished"]:
        return f"model_name_or_path: {public}, because {local} holds no finished run"
    values["model_name_or_path"] = local
    values.pop("model_revision", None)
    return f"model_name_or_path: {local}, this repository's own run, in place of {public}"


# What can be found wrong without data: unknown keys, wrong types, and what would go wrong in silence


def stage_of(values: Mapping[str, Any]) -> str:
    """ "preference" if a key is only found in such recipes, else "sft"."""
    both = {f.name for cls in (SFTConfig, DataConfig) for f in fields(cls)} | RECIPE_ONLY.keys()
    only = {f.name for f in fields(PreferenceRunConfig)} - both
    return "preference" if values.keys() & only else "sft"


def check_types(values: Mapping[str, Any], stage: str, origin: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Bring values to the types that the dataclasses declare.

    Args:
        origin: where each key was set, for the messages.

    Returns:
        A line for each unknown or refused key and each wrong type; the values without those.
    """
    annotations, choices = dict(RECIPE_ONLY), {}
    for cls in (ARGUMENTS[stage], DataConfig, ModelConfig):
        annotations |= typing.get_type_hints(cls, include_extras=True)
        choices |= {f.name: f.metadata["choices"] for f in fields(cls) if "choices" in f.metadata}
    annotations |= MEANINGFUL
    refused = REFUSED | (REFUSED_IN_PREFERENCE if stage == "preference" else {})
    problems, sound = [], {}
    for key, value in values.items():
        where = f"{origin[key]}: {key}"
        if key in refused and value:  # false or null asks for what happens anyway
            problems.append(f"{where} can't be set: {refused[key]}")
        elif ACCESS_TOKEN.search(json.dumps(value, default=str)):
            problems.append(f"{where} looks like an access token, which doesn't belong in a recipe")
        elif key not in annotations:
            near = difflib.get_close_matches(key, annotations, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if stage == "preference" and any(key in cls.hints or hasattr(cls, key) for cls in OBJECTIVES.values()):
                hint = f": it belongs in the objective block (objective.{key})"
            problems.append(f"{where} is not a key of {stage} recipes{hint}")
        else:
            try:
                sound[key] = coerce(value, annotations[key])
            except ValueError as error:
                if value is not None:  # null takes back what a layer below says
                    problems.append(f"{where} is {value!r}: {error}")
            else:
                if choices.get(key) and sound[key] not in (None, *choices[key]):
                    problems.append(f"{where} is {value!r}: expected one of {', '.join(choices[key])}")
    return problems, sound


def check_values(given: Mapping[str, Any], values: Mapping[str, Any], stage: str) -> list[str]:
    """A line for each key missing in `given`, and each contradiction in `values`, those of the right type."""
    # A key whose value has a wrong type is named already: it is not missing.
    problems = [f"{key} is missing" for key in ("model_name_or_path", "output_dir") if not given.get(key)]
    for keys in (("global_batch_size", "gradient_accumulation_steps"), ("dataset_name", "datasets")):
        if bool(given.get(keys[0])) == bool(given.get(keys[1])):
            problems.append(f"{' and '.join(keys)}: set one of them, and not both")
    steps, optimizer = values.get("max_steps", -1), str(values.get("optim", "adamw_torch"))
    plain, projecting = optimizer.startswith(("adamw_torch", "adafactor")), optimizer.startswith(("galore", "apollo"))
    in_folder = Path(values.get("model_name_or_path") or "").is_dir()
    lora = "" if values.get("use_peft") else ", ".join(key for key in values if key.startswith(ADAPTERS))
    fused = (values.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy")
    # Each would do nothing, or something else than it says, without a word; the last after the training.
    silent = {
        "output_dir: libraries read *, ? and [ as patterns": glob.has_magic(values.get("output_dir") or ""),
        "max_steps: expected 1 or more, or -1 for num_train_epochs": steps < 1 and steps != -1,
        "fp16: a CPU computes in float32 all the same": values.get("fp16") and values.get("use_cpu"),
        "model_revision: model_name_or_path is a folder": in_folder and values.get("model_revision", "main") != "main",
        "optim_args: this optimizer reads the keys adam_... alone": values.get("optim_args") and plain,
        "optim_target_modules: only galore and apollo read it": values.get("optim_target_modules") and not projecting,
        "liger_kernel_config.fused_linear_cross_entropy: it would undo our fused LM head": fused,
        f"{lora}: all weights would be trained without use_peft: true": lora,
        "push_to_hub needs hub_model_id": values.get("push_to_hub") and not values.get("hub_model_id"),
    }
    problems += [what for what, found in silent.items() if found]
    checks = [
        lambda: of_recipe(DataConfig, values),
        lambda: template_text(values.get("chat_template")),
    ]
    if stage == "preference":
        checks.append(lambda: build_objective(values.get("objective", {})))
        length, prompt_length = (
            values.get(key, getattr(PreferenceRunConfig, key)) for key in ("max_length", "max_prompt_length")
        )
        if prompt_length >= length:
            problems.append(f"max_prompt_length is {prompt_length}: expected less than max_length ({length})")
    # Every check runs, even if one fails.
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def template_text(template: str | None) -> str | None:
    """The chat template itself, read from its file if `template` is a path. Raises ConfigError if it is neither."""
    if template is None or "{%" in template or "{{" in template:
        return template
    try:
        return Path(template).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template is {template!r}, neither template text nor a file: {error}") from error
