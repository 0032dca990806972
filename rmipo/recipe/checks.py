"""What can be found wrong with a recipe without its data: unknown keys, wrong types, and what would go wrong in silence."""

import difflib
import glob
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rmipo.errors import ConfigError
from rmipo.objectives import OBJECTIVES, build_objective
from rmipo.recipe import arguments
from rmipo.recipe.files import coerce
from rmipo.recipe.schema import ARGUMENTS, RECIPE_ONLY, DataConfig, ModelConfig, PreferenceRunConfig, SFTConfig

# Keys of the libraries that would be ignored in silence, or spoil a run, and what to do in their place.
REFUSED = {
    "hub_token": "log in with `.venv/bin/hf auth login` or set HF_TOKEN: recipes are saved beside models and sent to trackers",
    "chat_template_path": "use chat_template",
    "auto_find_batch_size": "it would change the batch size behind global_batch_size",
    "resume_from_checkpoint": "the same command goes on from its last complete checkpoint",
    "bf16_full_eval": arguments.UNUSABLE["bf16_full_eval"],
    "fp16_full_eval": arguments.UNUSABLE["fp16_full_eval"],
}
REFUSED_IN_PREFERENCE = arguments.UNUSABLE | {
    "attn_implementation": "packed pairs have their own kernels: use attention"
}
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
        lambda: DataConfig(**{f.name: values[f.name] for f in fields(DataConfig) if f.name in values}),
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
