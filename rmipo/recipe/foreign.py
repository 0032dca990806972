"""Recipes of other repositories: their keys in the words used here, with a notice of what became of each.

Read are the alignment-handbook's two forms (`dataset_mixer` with `dataset_splits`, and `dataset_mixture`) and what was
built on it: SimPO, SimPER, alpha-DPO, epsilon-DPO and the RMiPO authors' own.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from trl import DPOConfig

from rmipo.recipe.schema import DataConfig, ModelConfig, PreferenceRunConfig

Values = dict[str, Any]

RENAMED = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",  # transformers 5 reads a value below 1 as a ratio
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "hub_model_revision": "hub_revision",
}
# Without effect here: pairs are always packed and the reference scored once, code from the hub is not run, W&B is set in
# the environment.
IGNORED = (
    *("overwrite_output_dir", "trust_remote_code", "padding_free", "precompute_ref_log_probs", "push_to_hub_revision"),
    *("auto_insert_empty_system_msg", "do_train", "do_eval", "logging_dir", "save_safetensors", "dataset_kwargs"),
    *("wandb_entity", "wandb_project", "wandb_run_group", "hub_strategy"),
)
MIXED = ("dataset_mixer", "dataset_mixture", "use_flash_attention_2")
ENTRY = {"id": "path", "config": "name", "split": "split", "columns": "columns", "weight": "weight"}
MIXTURE = {"test_split_size": "test_split_size", "seed": "mixture_seed"}
# What trains another run than TRL's where a recipe leaves it out.
OTHER_DEFAULTS = ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "max_length")
LOSSES = ("sigmoid", "ipo", "simpo", "simper", "alpha-dpo", "epsilon-dpo", "rmipo")


def translate(values: Mapping[str, Any], is_recipe: bool) -> tuple[Values, list[str]]:
    """The values of a file with the keys of other repositories replaced, and the notices to print.

    Raises ValueError for keys that are there twice or in no known form, and for an unknown `loss_type`.
    """
    values, notices = dict(values), []
    preference = is_recipe and _is_preference(values)
    _translate_keys(values, notices)
    if preference:
        if "objective" not in values:
            values["objective"] = _objective(values)
            notices.append(f"objective: {values['objective']} (translated from loss_type and its keys)")
        # Our own kernels, and what a recipe spells out although it is TRL's default.
        known = {f.name for cls in (PreferenceRunConfig, DataConfig, ModelConfig) for f in fields(cls)}
        repeated = [f.name for f in fields(DPOConfig) if f.name not in known and values.get(f.name, ...) == f.default]
        for key in ("attn_implementation", *repeated):
            if key in values:
                notices.append(f"{key}: {values.pop(key)} ignored: it has no effect here")
        if isinstance(length := values.get("max_length"), int):
            values.setdefault("max_prompt_length", length - 1)  # TRL has no limit of its own for prompts
        if left_out := [key for key in OTHER_DEFAULTS if key not in values]:
            ours = ", ".join(f"{key}: {getattr(PreferenceRunConfig, key)}" for key in left_out)
            notices.append(f"left out, so as in this repository and not as in TRL: {ours}")
    if is_recipe and "gradient_accumulation_steps" in values and "global_batch_size" not in values:
        steps, pairs = values["gradient_accumulation_steps"], values.get("per_device_train_batch_size", 8)
        notices.append(
            f"gradient_accumulation_steps: {steps} read as global_batch_size: {pairs} x {steps} x number of processes"
        )
    return values, notices


def _is_preference(values: Values) -> bool:
    """Whether a recipe is another repository's for preference training, perhaps with an objective block added to it."""
    if "global_batch_size" in values:  # a key that only this repository has
        return False
    if "objective" in values:
        return "gradient_accumulation_steps" in values
    preference = values.keys() & {"beta", "gamma_beta_ratio", "max_prompt_length"}
    return bool(preference) or values.get("loss_type", "nll") not in ("nll", "dft", "chunked_nll")


def _translate_keys(values: Values, notices: list[str]) -> None:
    """What any layer may have, in place."""
    if not values.keys() & {*RENAMED, *IGNORED, *MIXED}:
        return
    new = {RENAMED[key]: values.pop(key) for key in RENAMED if key in values}
    if new.get("dtype", "") is None:
        new["dtype"] = "float32"  # what transformers loaded for null, before "auto" was its default
    if "use_flash_attention_2" in values:
        new["attn_implementation"] = "flash_attention_2" if values.pop("use_flash_attention_2") else "sdpa"
    try:
        for key, translated in (("dataset_mixer", _mixer), ("dataset_mixture", _mixture)):
            if key in values:
                new |= translated(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: not in the handbook's form: {error}") from error
    # Which of the two was meant can't be known.
    if twice := new.keys() & values.keys():
        raise ValueError(f"{', '.join(twice)}: set under another repository's name too; keep one of them")
    values |= new
    notices += [f"{key}: {value} (translated from another repository's key)" for key, value in new.items()]
    notices += [f"{key}: {values.pop(key)} ignored: it has no effect here" for key in IGNORED if key in values]


def _objective(values: Values) -> Values:
    """The block that `loss_type` and its keys mean; takes them out of `values`.

    A `loss_type` has to be there: most methods have the same keys.
    """
    given = values.pop("loss_type", None)
    loss = given[0] if isinstance(given, list) and len(given) == 1 else given
    if loss not in LOSSES:
        own = "an objective block, such as objective: {name: dpo, beta: 0.01}"
        raise ValueError(f"loss_type is {loss!r}: expected one of {', '.join(LOSSES)}, or {own}")
    try:
        if loss == "sigmoid":
            return {"name": "dpo", "beta": values.pop("beta", DPOConfig.beta)}
        if loss == "ipo":
            return {"name": "ipo", "tau": values.pop("beta", DPOConfig.beta)}
        if loss == "epsilon-dpo":
            return {"name": loss, "beta": values.pop("beta"), "epsilon": values.pop("epsilon")}
        if loss == "alpha-dpo":
            values.pop("trainer_type", None)
            block = {key: values.pop(key) for key in ("beta", "gamma_beta_ratio", "alpha")}
            return {"name": loss, **block, "length_normalization": values.pop("ln", True)}
        beta, ratio = values.pop("beta", 2.0), values.pop("gamma_beta_ratio", None)
        if loss == "simpo":
            return {"name": loss, "beta": beta, "gamma": beta * ratio}
        # SimPER has no hyperparameter. The RMiPO authors' code has the bounds 0.3 and 1.6 in it, and multiplies the margin
        # by beta (docs/FIDELITY.md); it reads no gamma_beta_ratio.
        return {"name": loss} if loss == "simper" else {"name": loss, "beta": beta, "fidelity": "release"}
    except (KeyError, TypeError) as error:
        raise ValueError(f"loss_type: {loss} needs {error}") from error


def _mixer(values: Values) -> Values:
    """`dataset_mixer: {id: share}`, `dataset_splits: [train_x, test_x]`, `dataset_configs: [...]`."""
    shares, splits = values.pop("dataset_mixer"), values.pop("dataset_splits", ["train", "test"])
    configs = values.pop("dataset_configs", [None] * len(shares))
    test = [split for split in splits if "test" in split]
    (train,) = set(splits) - set(test)  # ValueError for several
    common = {"split": train} | ({"test_split": test[0]} if test else {})
    return {
        "datasets": [
            {"path": path} | ({"name": config} if config else {}) | common | {"weight": share}
            for (path, share), config in zip(shares.items(), configs, strict=True)
        ]
    }


def _mixture(values: Values) -> Values:
    """`dataset_mixture: {datasets: [{id, config, split, columns, weight}], test_split_size, seed}`."""
    mixture = dict(values.pop("dataset_mixture"))
    entries = [_rename(entry, ENTRY) for entry in mixture.pop("datasets")]
    return {"datasets": entries} | _rename(mixture, MIXTURE)


def _rename(block: Values, names: dict[str, str]) -> Values:
    return {names[key]: value for key, value in block.items() if value is not None}
