"""Recipes of other repositories: their keys in the words used here, with a notice of what became of each.

Read are the alignment-handbook's two forms (`dataset_mixer` with `dataset_splits`, and `dataset_mixture`) and what was
built on it: SimPO, SimPER, alpha-DPO, epsilon-DPO and the RMiPO authors' own. Nothing here runs for a recipe that has
none of these keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from trl import DPOConfig

from rmipo.recipe.arguments import FIXED_IN_PREFERENCE
from rmipo.recipe.checks import FIXED
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
IGNORED = {
    "overwrite_output_dir": "a finished run is never overwritten",
    "trust_remote_code": "code from the hub is not run",
    "padding_free": "pairs are always packed without padding",
    "precompute_ref_log_probs": "the reference is always scored once, before training",
    "auto_insert_empty_system_msg": "messages are rendered as they are",
    "do_train": "it is what the script does",
    "do_eval": "eval_strategy says when",
    "logging_dir": "logs are written to output_dir",
    "save_safetensors": "models are always saved as safetensors",
    "push_to_hub_revision": "push_to_hub and hub_revision say what is uploaded",
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_project": "set WANDB_PROJECT in the environment",
    "wandb_run_group": "set WANDB_RUN_GROUP in the environment",
}
KEYS = RENAMED.keys() | IGNORED.keys() | {"use_flash_attention_2", "dataset_mixer", "dataset_mixture"}


@dataclass(frozen=True)
class Method:
    """How other recipes write an objective: the keys that `block` reads, and those that the method's own code ignores."""

    block: Callable[[Values], Values]
    keys: tuple[str, ...] = ("beta",)
    unread: tuple[str, ...] = ()


BETA = DPOConfig.beta  # TRL's default
METHODS = {
    "dpo": Method(lambda v: {"beta": v.get("beta", BETA)}),
    "ipo": Method(lambda v: {"tau": v.get("beta", BETA)}),
    "simpo": Method(
        lambda v: {"beta": v.get("beta", 2.0), "gamma": v.get("beta", 2.0) * v["gamma_beta_ratio"]},
        ("beta", "gamma_beta_ratio"),
    ),
    "simper": Method(lambda v: {}, (), ("beta", "gamma_beta_ratio")),
    "alpha-dpo": Method(
        lambda v: {
            **{key: v[key] for key in ("beta", "gamma_beta_ratio", "alpha")},
            "length_normalization": v.get("ln", True),
        },
        ("beta", "gamma_beta_ratio", "alpha", "ln", "trainer_type"),
    ),
    "epsilon-dpo": Method(lambda v: {key: v[key] for key in ("beta", "epsilon")}, ("beta", "epsilon")),
    # The authors' code has the bounds 0.3 and 1.6 in it, and multiplies the margin by beta: see docs/FIDELITY.md.
    "rmipo": Method(lambda v: {"beta": v.get("beta", 2.0), "fidelity": "release"}, ("beta",), ("gamma_beta_ratio",)),
}
LOSSES = {"sigmoid": "dpo"} | {name: name for name in METHODS if name != "dpo"}  # loss_type -> method
SFT_LOSSES = ("nll", "dft", "chunked_nll")  # loss_type is a key of SFT recipes, too
# Where these are left out, the run is another one than in TRL.
OTHER_DEFAULTS = ("num_train_epochs", "lr_scheduler_type", "warmup_steps", "max_length")


def is_foreign(values: Mapping[str, Any]) -> bool:
    """Whether a file has keys that only other repositories' recipes have."""
    return bool(values.keys() & KEYS)


def is_foreign_preference(values: Mapping[str, Any]) -> bool:
    """Whether a recipe is another repository's for preference training, perhaps with an objective block added to it."""
    if "global_batch_size" in values:
        return False
    if "objective" in values:
        return is_foreign(values) or "gradient_accumulation_steps" in values
    preference = values.keys() & {"beta", "gamma_beta_ratio", "max_prompt_length"}
    return bool(preference or values.get("loss_type", "nll") not in SFT_LOSSES)


def translate(values: Values) -> tuple[Values, list[str]]:
    """`values` of a file with the keys of other repositories replaced, and the notices to print.

    Raises:
        ValueError: listing all keys that can't be translated, one per line.
    """
    values, notices, problems = dict(values), [], []

    def read_as(old: str, new_values: Values) -> None:
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
    notices += _drop_fixed(values, FIXED)
    for key, translated in (("dataset_mixer", _mixer), ("dataset_mixture", _mixture)):
        if key in values:
            try:
                read_as(key, translated(values))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"{key}: not in the handbook's form: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return values, sorted(notices)


def translate_preference(values: Values) -> tuple[Values, list[str]]:
    """A preference recipe, given an objective block if it has none.

    Raises ValueError where its `loss_type` is unknown, or not there: most methods have the same keys.
    """
    values, notices = dict(values), []
    if "objective" not in values:
        given = values.pop("loss_type", None)
        loss = given[0] if isinstance(given, list) and len(given) == 1 else given
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(
                f"loss_type is {loss!r}: expected one of {', '.join(LOSSES)}, or an objective block, such as "
                "objective: {name: dpo, beta: 0.01}, that says which method it trains"
            )
        method = METHODS[LOSSES[loss]]
        try:
            values["objective"] = {"name": LOSSES[loss], **method.block(values)}
        except (KeyError, TypeError) as error:
            raise ValueError(f"loss_type: {loss} needs {', '.join(method.keys)}: {error}") from error
        notices.append(f"loss_type: {loss} read as objective: {_short(values['objective'])}")
        for key in (*method.keys, *method.unread):
            if values.pop(key, None) is not None and key in method.unread:
                notices.append(f"{key} ignored: the code of {loss} doesn't read it")
    if "attn_implementation" in values:
        value = values.pop("attn_implementation")
        notices.append(f"attn_implementation: {value} ignored: packed pairs have their own kernels, see `attention`")
    notices += _drop_fixed(values, FIXED_IN_PREFERENCE)
    known = {f.name for cls in (PreferenceRunConfig, DataConfig, ModelConfig) for f in fields(cls)}
    for key in [f.name for f in fields(DPOConfig) if f.name not in known and values.get(f.name, ...) == f.default]:
        notices.append(f"{key}: {values.pop(key)} ignored: it is TRL's default")
    if isinstance(length := values.get("max_length"), int):
        values.setdefault("max_prompt_length", length - 1)  # TRL has no limit of its own for prompts
    if left_out := [key for key in OTHER_DEFAULTS if key not in values]:
        ours = ", ".join(f"{key}: {getattr(PreferenceRunConfig, key)}" for key in left_out)
        notices.append(f"left out, so as in this repository and not as in TRL: {ours}")
    return values, notices


def _drop_fixed(values: Values, fixed: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Take the keys out that change nothing here; a notice for each that asked for something else."""
    dropped = {key: values.pop(key) for key in fixed.keys() & values.keys()}
    return [
        f"{key}: {_short(dropped[key])} ignored: {fixed[key][1]}" for key in dropped if dropped[key] != fixed[key][0]
    ]


def accumulation_notice(values: Mapping[str, Any]) -> str | None:
    """What a recipe without a global batch has in its place."""
    if "gradient_accumulation_steps" not in values or "global_batch_size" in values:
        return None
    steps, pairs = values["gradient_accumulation_steps"], values.get("per_device_train_batch_size", 8)
    return f"gradient_accumulation_steps: {steps} read as global_batch_size: {pairs} x {steps} x number of processes"


def _mixer(values: Values) -> Values:
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


def _mixture(values: Values) -> Values:
    """`dataset_mixture: {datasets: [{id, config, split, columns, weight}], test_split_size, seed}`."""
    mixture = dict(values["dataset_mixture"])
    entries = [_rename(entry, ENTRY) for entry in mixture.pop("datasets")]
    return {"datasets": entries} | _rename(mixture, MIXTURE)


def _rename(block: Values, names: dict[str, str]) -> Values:
    unknown = [key for key in block if key not in names]
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}: expected {', '.join(names)}")
    return {names[key]: value for key, value in block.items() if value is not None}


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
