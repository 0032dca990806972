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
    "bf16_full_eval": arguments.REFUSED["bf16_full_eval"],
    "fp16_full_eval": arguments.REFUSED["fp16_full_eval"],
}
REFUSED_IN_PREFERENCE = arguments.REFUSED | {
    "attn_implementation": "packed pairs have their own kernels: use attention"
}
ADAPTERS = ("lora_", "use_rslora", "use_dora")
# Numbers that the libraries take and that would train nothing, train without clipping, or save nothing, without a word.
BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
MEANINGFUL = dict.fromkeys(("learning_rate", "num_train_epochs", "save_steps"), PositiveFloat)
MEANINGFUL |= dict.fromkeys(BATCHES, PositiveInt)
MEANINGFUL |= {"eval_steps": PositiveFloat | None, "max_grad_norm": NonNegativeFloat, "weight_decay": NonNegativeFloat}
MEANINGFUL |= {"lora_r": PositiveInt, "lora_alpha": PositiveInt}
MEANINGFUL |= {"max_tokens_per_micro_batch": PositiveInt | None, "max_length": PositiveInt | None}
MEANINGFUL |= {"max_prompt_length": PositiveInt, "generation_samples": NonNegativeInt}
ACCESS_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|wandb_v1_\w+)")


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
    annotations = _annotations(stage)
    choices = {f.name: f.metadata.get("choices") for cls in (ARGUMENTS[stage], ModelConfig) for f in fields(cls)}
    refused = REFUSED | (REFUSED_IN_PREFERENCE if stage == "preference" else {})
    problems, sound = [], {}
    for key, value in values.items():
        where = f"{origin[key]}: {key}"
        if key in refused and value:  # false or null asks for what happens anyway
            problems.append(f"{where} can't be set: {refused[key]}")
        elif ACCESS_TOKEN.search(json.dumps(value, default=str)):
            problems.append(f"{where} looks like an access token, which doesn't belong in a recipe")
        elif key not in annotations:
            problems.append(f"{where} {_unknown(key, annotations, stage)}")
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
    if glob.has_magic(values.get("output_dir") or ""):  # DeepSpeed and vLLM would read another folder's weights
        problems.append(f"output_dir is {values['output_dir']!r}: libraries read *, ? and [ as patterns")
    if (given.get("global_batch_size") is None) == (given.get("gradient_accumulation_steps") is None):
        problems.append("global_batch_size is missing, or gradient_accumulation_steps contradicts it: set one of them")
    if bool(given.get("dataset_name")) == bool(given.get("datasets")):
        problems.append("the data is ambiguous or missing: expected either dataset_name or datasets (a mixture)")
    steps = values.get("max_steps", -1)
    if steps < 1 and steps != -1:  # transformers would train one step for 0
        problems.append(f"max_steps is {steps}: expected 1 or more, or -1 for num_train_epochs")
    if values.get("fp16") and values.get("use_cpu"):
        problems.append("fp16: a CPU computes in float32 all the same. Remove it")
    if Path(values.get("model_name_or_path") or "").is_dir() and values.get("model_revision", "main") != "main":
        problems.append(f"model_revision is {values['model_revision']}: model_name_or_path is a folder. Remove it")
    if not values.get("use_peft") and (lora := [key for key in values if key.startswith(ADAPTERS)]):
        problems.append(f"{', '.join(lora)}: all weights would be trained without use_peft: true")
    if values.get("optim_args") and str(values.get("optim", "adamw_torch")).startswith(("adamw_torch", "adafactor")):
        problems.append(
            f"optim_args is {values['optim_args']!r}: this optimizer doesn't read it. Use the keys adam_..."
        )
    optimizer = str(values.get("optim", "adamw_torch"))
    if values.get("optim_target_modules") and not optimizer.startswith(("galore", "apollo")):
        problems.append("optim_target_modules: only galore and apollo read it. Remove it")
    if (values.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        problems.append(
            "liger_kernel_config.fused_linear_cross_entropy would undo the fused LM head of this repository"
        )
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        problems.append("push_to_hub needs hub_model_id, the repository to upload to, such as name/llama3-8b-rmipo")
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
    if not template.endswith(".jinja"):
        raise ConfigError(f"chat_template is {template!r}: expected template text or the path of a .jinja file")
    try:
        return Path(template).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template is {template!r}: {error}") from error


def _annotations(stage: str) -> dict[str, Any]:
    types = dict(RECIPE_ONLY)
    for cls in (ARGUMENTS[stage], DataConfig, ModelConfig):
        types |= typing.get_type_hints(cls, include_extras=True)
    return types | MEANINGFUL


def _unknown(key: str, known: Mapping[str, Any], stage: str) -> str:
    other = "preference" if stage == "sft" else "sft"
    if key in _annotations(other):
        return f"is a key of {other} recipes, and this is one of stage {stage}"
    hyperparameters = {name for cls in OBJECTIVES.values() for name in [f.name for f in fields(cls)] + list(cls.hints)}
    if stage == "preference" and key in hyperparameters:
        return f"belongs in the objective block (objective.{key})"
    near = difflib.get_close_matches(key, known, n=1)
    return f"is not a key of recipes{f'; did you mean {near[0]}?' if near else ''}"
