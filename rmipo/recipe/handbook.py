"""Recipes of the alignment-handbook: its keys in the words used here, with a notice of what was read as what.

The handbook: https://github.com/huggingface/alignment-handbook. Both its recipe forms are read, `dataset_mixer` with
`dataset_splits` and the newer `dataset_mixture`, and a DPO recipe's `beta` and `loss_type` become an objective block.
"""

from typing import Any

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

IGNORED = {
    "overwrite_output_dir": "a finished run is never overwritten",
    "trust_remote_code": "code from the hub is not run",
    "padding_free": "pairs are always packed without padding",
    "precompute_ref_log_probs": "the reference is always scored once, before training",
    "auto_insert_empty_system_msg": "messages are rendered as they are",
    "logging_dir": "logs are written to output_dir",
    "save_safetensors": "models are always saved as safetensors",
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_project": "set WANDB_PROJECT in the environment",
    "wandb_run_group": "set WANDB_RUN_GROUP in the environment",
}

LOSSES = {"sigmoid": ("dpo", "beta"), "ipo": ("ipo", "tau")}  # loss_type -> objective, and what it calls beta
DEFAULT_BETA = 0.1  # of TRL's DPOConfig


def translate(values: dict[str, Any], is_recipe: bool = True) -> tuple[dict[str, Any], list[str]]:
    """`values` with the handbook's keys replaced, and the notices to print.

    `is_recipe=False` is for an overlay or overrides: they don't turn a recipe into one for DPO.

    Raises:
        ValueError: listing all keys that can't be translated, one per line.
    """
    values, notices, problems = dict(values), [], []

    def read_as(old: str, new_values: dict[str, Any]) -> None:
        problems.extend(f"{old}: {new} is set too; keep one of them" for new in new_values if new in values)
        shown = ", ".join(f"{new}: {_short(value)}" for new, value in new_values.items())
        notices.append(f"{old}: {_short(values.pop(old))} read as {shown}")
        values.update(new_values)

    for old, new in RENAMED.items():
        if old in values:
            value = "float32" if (old, values[old]) == ("torch_dtype", None) else values[old]
            read_as(old, {new: value})
    if "use_flash_attention_2" in values:
        wanted = values["use_flash_attention_2"]
        read_as("use_flash_attention_2", {"attn_implementation": "flash_attention_2" if wanted else "sdpa"})
    for key in IGNORED.keys() & values.keys():
        notices.append(f"{key}: {_short(values.pop(key))} ignored: {IGNORED[key]}")
    for key, translated in (("dataset_mixer", _mixer), ("dataset_mixture", _mixture)):
        if key in values:
            try:
                read_as(key, translated(values))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{key}: not in the handbook's form: {error}")
    if is_recipe and "objective" not in values and ("beta" in values or values.get("loss_type") in LOSSES):
        loss_type, beta = values.pop("loss_type", "sigmoid"), values.pop("beta", DEFAULT_BETA)
        if loss_type in LOSSES:
            name, hyperparameter = LOSSES[loss_type]
            values["objective"] = {"name": name, hyperparameter: beta}
            notices.append(f"loss_type: {loss_type}, beta: {beta} read as objective: {_short(values['objective'])}")
        else:
            known = ", ".join(LOSSES)
            problems.append(f"loss_type: {loss_type!r} has no translation ({known} have); write an objective block")
    if "objective" in values and "attn_implementation" in values:
        value = values.pop("attn_implementation")
        notices.append(f"attn_implementation: {value} ignored: packed pairs have their own kernels, see `attention`")
    if is_recipe and "gradient_accumulation_steps" in values and "global_batch_size" not in values:
        steps, pairs = values["gradient_accumulation_steps"], values.get("per_device_train_batch_size", 8)
        notices.append(
            f"gradient_accumulation_steps: {steps} read as global_batch_size: {pairs} x {steps} x number of processes"
        )
    if problems:
        raise ValueError("\n".join(problems))
    return values, sorted(notices)


def _mixer(values: dict[str, Any]) -> dict[str, Any]:
    """`dataset_mixer: {id: share}`, `dataset_splits: [train_x, test_x]`, `dataset_configs: [...]`."""
    splits = values.pop("dataset_splits", ["train", "test"])
    configs = values.pop("dataset_configs", [None] * len(values["dataset_mixer"]))
    train = [split for split in splits if "test" not in split]
    test = [split for split in splits if "test" in split]
    if len(train) != 1 or len(test) > 1:
        raise ValueError(f"dataset_splits are {splits}: expected one for training and one with `test` in its name")
    common = {"split": train[0]} | ({"test_split": test[0]} if test else {})
    return {
        "datasets": [
            {"path": path} | ({"name": config} if config else {}) | common | {"weight": share}
            for (path, share), config in zip(values["dataset_mixer"].items(), configs, strict=True)
        ]
    }


ENTRY = {"id": "path", "config": "name", "split": "split", "columns": "columns", "weight": "weight"}
MIXTURE = {"test_split_size": "test_split_size", "seed": "mixture_seed"}


def _mixture(values: dict[str, Any]) -> dict[str, Any]:
    """`dataset_mixture: {datasets: [{id, config, split, columns, weight}], test_split_size, seed}`."""
    mixture = dict(values["dataset_mixture"])
    entries = [_rename(entry, ENTRY) for entry in mixture.pop("datasets")]
    return {"datasets": entries} | _rename(mixture, MIXTURE)


def _rename(block: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    unknown = [key for key in block if key not in names]
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}: expected {', '.join(names)}")
    return {names[key]: value for key, value in block.items() if value is not None}


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
