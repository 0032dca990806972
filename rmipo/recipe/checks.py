"""What can be found wrong with a recipe without its data: unknown keys, wrong types, values out of range."""

import contextlib
import difflib
import glob
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rmipo.errors import ConfigError
from rmipo.objectives import OBJECTIVES, build_objective
from rmipo.recipe.arguments import FIXED_IN_PREFERENCE
from rmipo.recipe.files import coerce
from rmipo.recipe.schema import ARGUMENTS, RECIPE_ONLY, DataConfig, ModelConfig, PreferenceRunConfig, SFTConfig

REFUSED = {
    "hub_token": "log in with `.venv/bin/hf auth login` or set HF_TOKEN: recipes are saved beside models and sent to trackers",
    "chat_template_path": "use chat_template",
    "local_rank": "the launcher sets it",
    "auto_find_batch_size": "it would change the batch size behind global_batch_size",
    "model_init_kwargs": "use the keys of the model: dtype, model_revision, attn_implementation",
    "parallelism_config": "SHARDING sets how a model is distributed",
    "resume_from_checkpoint": "the same command goes on from its last complete checkpoint",
}
REFUSED_IN_PREFERENCE = {
    "attn_implementation": "packed pairs have their own kernels: use attention",
    "label_smoothing_factor": "no objective reads it",
}
# Keys of the libraries that change nothing here: what a run does in any case, and why. Another value is refused, so that
# a recipe as it is printed and recorded is the run that it describes.
FIXED = {
    "hub_strategy": ("end", "a model is uploaded once, when it is verified and has its card"),
    "hub_always_push": (False, "a model is uploaded once, when it is verified and has its card"),
    "dataset_kwargs": (None, "rows are prepared here"),
    "use_cache": (True, "it is what generation with the saved model uses"),
}
FIXED_IN_SFT = {
    "dataset_text_field": ("text", "rows are dialogues"),
}
# What a group of keys has no effect without.
ONLY_WITH = {
    "use_peft": ("lora_", "use_rslora", "use_dora"),
    "load_in_4bit": ("bnb_4bit_", "use_bnb_nested_quant"),
    "use_liger_kernel": ("liger_kernel_config",),
}
ACCESS_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|wandb_v1_\w+)")

LOWEST = dict.fromkeys(("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "max_grad_norm"), 0)
LOWEST |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "global_batch_size"), 1)
LOWEST |= {"max_length": 2, "max_prompt_length": 1, "generation_samples": 0, "generation_max_new_tokens": 1}
LOWEST |= {"max_tokens_per_micro_batch": 1, "ddp_timeout": 1, "warn_chosen_logp_drop": 0, "warn_grad_norm_ratio": 1}
LOWEST |= {"gradient_accumulation_steps": 1, "max_train_samples": 1, "max_eval_samples": 1, "dataset_num_proc": 1}
LOWEST |= {"seed": 0, "data_seed": 0, "mixture_seed": 0, "save_steps": 0, "eval_steps": 0, "logging_steps": 0}
LOWEST |= {"dataloader_num_workers": 0, "lora_r": 1, "lora_alpha": 1, "neftune_noise_alpha": 0}
LOWEST |= {"eval_accumulation_steps": 1, "pad_to_multiple_of": 1}
HIGHEST_SEED = 2**32 - 1  # of NumPy
SHARES = ("max_dropped_fraction", "max_truncated_fraction", "warn_repetition", "lora_dropout", "label_smoothing_factor")


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
    annotations, choices = _annotations(stage), _choices(stage)
    refused = REFUSED | (REFUSED_IN_PREFERENCE if stage == "preference" else {})
    fixed = FIXED | (FIXED_IN_PREFERENCE if stage == "preference" else FIXED_IN_SFT)
    problems, sound = [], {}
    for key, value in values.items():
        where = f"{origin[key]}: {key}"
        if key in refused:
            problems.append(f"{where} can't be set: {refused[key]}")
        elif ACCESS_TOKEN.search(json.dumps(value, default=str)):
            problems.append(f"{where} looks like an access token, which doesn't belong in a recipe")
        elif key not in annotations:
            problems.append(f"{where} {_unknown(key, annotations, stage)}")
        else:
            try:
                typed = coerce(value, annotations[key])
                if key in choices and typed is not None and typed not in choices[key]:
                    raise ValueError(f"expected one of {', '.join(choices[key])}")
                if key in fixed and typed != fixed[key][0]:
                    raise ValueError(f"it has no effect, {fixed[key][1]}. Remove it")
                sound[key] = typed
            except ValueError as error:
                problems.append(f"{where} is {value!r}: {error}")
    return problems, sound


def check_values(given: Mapping[str, Any], values: Mapping[str, Any], stage: str) -> list[str]:
    """A line for each key missing in `given`, and each range or contradiction in `values`, those of the right type."""
    problems = [f"{key} is missing" for key in ("model_name_or_path", "output_dir") if not given.get(key)]
    if glob.has_magic(str(given.get("output_dir", ""))):  # DeepSpeed and vLLM would read another folder's weights
        problems.append(f"output_dir is {given['output_dir']!r}: libraries read *, ? and [ as patterns. Leave them out")
    if all(given.get(key) is None for key in ("global_batch_size", "gradient_accumulation_steps")):
        problems.append("global_batch_size is missing (the paper's is 128)")
    if given.keys() >= {"global_batch_size", "gradient_accumulation_steps"}:
        problems.append("gradient_accumulation_steps follows from global_batch_size: remove it")
    if bool(given.get("dataset_name")) == bool(given.get("datasets")):
        problems.append("the data is ambiguous or missing: expected either dataset_name or datasets (a mixture)")
    try:
        DataConfig(**{f.name: values[f.name] for f in fields(DataConfig) if f.name in values})
    except ConfigError as error:
        problems += str(error).split("\n")
    for key, low in LOWEST.items():
        if values.get(key) is not None and values[key] < low:
            problems.append(f"{key} is {values[key]}: expected at least {low}")
    for key in ("seed", "data_seed"):
        if values.get(key) is not None and values[key] > HIGHEST_SEED:
            problems.append(f"{key} is {values[key]}: expected at most {HIGHEST_SEED}")
    if values.get("max_steps") == 0:  # transformers would train one step
        problems.append("max_steps is 0: expected 1 or more, or -1 for num_train_epochs")
    problems += [f"{key} is {values[key]}: expected 0 to 1" for key in SHARES if not 0 <= values.get(key, 0) <= 1]
    if (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        problems.append("load_in_4bit and load_in_8bit need use_peft: true: quantized weights can't be trained")
    for switch, prefixes in ONLY_WITH.items():
        if not values.get(switch) and (keys := [key for key in values if key.startswith(prefixes)]):
            problems.append(f"{', '.join(keys)}: no effect without {switch}: true")
    if (values.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy"):
        problems.append(
            "liger_kernel_config.fused_linear_cross_entropy is true: it would replace the model's forward, and with it the "
            "fused LM head of this repository. Remove it"
        )
    every = (values.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        problems.append(
            f"activation_checkpointing_kwargs.every_n_layers is {every!r}: expected a whole number, 1 or more"
        )
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        problems.append("push_to_hub needs hub_model_id, the repository to upload to, such as name/llama3-8b-rmipo")
    try:
        template_text(values.get("chat_template"))
    except ValueError as error:
        problems.append(str(error))
    cuts = not values.get("packing") and values.get("max_length", SFTConfig.max_length) is not None
    if values.get("truncation_mode") == "keep_end" and not cuts:
        problems.append("truncation_mode: keep_end has no effect with packing: true or max_length: null. Remove it")
    if values.get("packing") and "max_length" in values and values["max_length"] is None:
        problems.append(
            "max_length is null: expected a number of tokens, as packing: true fills sequences of that length"
        )
    if stage == "sft":
        problems += [
            f"{key} is true: the evaluation after the training would round the weights that are saved. Remove it"
            for key in ("bf16_full_eval", "fp16_full_eval")
            if values.get(key)
        ]
    if stage == "preference":
        length = values.get("max_length", PreferenceRunConfig.max_length)
        prompt_length = values.get("max_prompt_length", PreferenceRunConfig.max_prompt_length)
        if prompt_length >= length:
            problems.append(f"max_prompt_length is {prompt_length}: expected less than max_length ({length})")
        try:
            objective = build_objective(values.get("objective", {}))
        except ValueError as error:
            problems.append(str(error))
        else:
            if values.get("max_tokens_per_micro_batch") and objective.micro_batch_matters:
                problems.append(
                    f"max_tokens_per_micro_batch is {values['max_tokens_per_micro_batch']}: expected null, as a pair's "
                    f"loss under this {objective.name} depends on the pairs in its micro-batch. Set "
                    "per_device_train_batch_size"
                )
    return problems


def template_text(template: str | None) -> str | None:
    """The chat template itself, read from its file if `template` is a path.

    Raises:
        ValueError: no such file, not UTF-8, or neither a path nor a template.
    """
    if template is None or "{%" in template or "{{" in template:
        return template
    if not template.endswith(".jinja"):
        raise ValueError(f"chat_template is {template!r}: expected template text or the path of a .jinja file")
    if not Path(template).is_file():
        raise ValueError(f"chat_template is {template!r}: no such file")
    try:
        return Path(template).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template is {template!r}: {error}") from error


def _annotations(stage: str) -> dict[str, Any]:
    types = dict(RECIPE_ONLY)
    for cls in (ARGUMENTS[stage], DataConfig, ModelConfig):
        types |= typing.get_type_hints(cls)
    return types


def takes_null(key: str) -> bool:
    """Whether null is a value of this key in a stage; also of keys that there are not, which are refused as such."""
    annotations = [known[key] for known in map(_annotations, ARGUMENTS) if key in known]
    for annotation in annotations:
        with contextlib.suppress(ValueError):
            coerce(None, annotation)
            return True
    return not annotations


def _choices(stage: str) -> dict[str, list[str]]:
    choices = {f.name: f.metadata.get("choices") for cls in (ARGUMENTS[stage], ModelConfig) for f in fields(cls)}
    return {key: options for key, options in choices.items() if options}


def _unknown(key: str, known: Mapping[str, Any], stage: str) -> str:
    other = "preference" if stage == "sft" else "sft"
    if key in _annotations(other):
        return f"is a key of {other} recipes, and this is one of stage {stage}"
    hyperparameters = {name for cls in OBJECTIVES.values() for name in [f.name for f in fields(cls)] + list(cls.hints)}
    if stage == "preference" and key in hyperparameters:
        return f"belongs in the objective block (objective.{key})"
    near = difflib.get_close_matches(key, known, n=1)
    return f"is not a key of recipes{f'; did you mean {near[0]}?' if near else ''}"
