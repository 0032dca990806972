"""Recipes of other repositories: their keys in the words used here, with a notice of what became of each.

Read are the alignment-handbook's two forms (`dataset_mixer` with `dataset_splits`, and `dataset_mixture`) and what was
built on it: SimPO, SimPER, alpha-DPO, epsilon-DPO and the RMiPO authors' own.
"""

from typing import Any

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
MIXTURE = {"seed": "mixture_seed", "id": "path", "config": "name"}  # of `dataset_mixture` and its entries
DATA = {"dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture"}
# Without effect here: pairs are always packed by kernels of our own, the reference scored once, code from the hub is not
# run, W&B is set in the environment.
IGNORED = (
    *("overwrite_output_dir", "trust_remote_code", "padding_free", "precompute_ref_log_probs", "push_to_hub_revision"),
    *("auto_insert_empty_system_msg", "do_train", "do_eval", "logging_dir", "save_safetensors", "dataset_kwargs"),
    *("wandb_entity", "wandb_project", "wandb_run_group", "hub_strategy", "trainer_type", "use_flash_attention_2"),
)
# The hyperparameters of a `loss_type`, with the defaults of its code; null: there is none. The RMiPO authors' code has the
# bounds 0.3 and 1.6 in it, and multiplies the margin by beta (docs/FIDELITY.md).
OBJECTIVES = {
    "sigmoid": {"beta": 0.1},  # DPO
    "ipo": {"tau": 0.1},
    "simpo": {"beta": 2.0},  # and gamma, which is their ratio times beta
    "simper": {},
    "alpha-dpo": {"beta": None, "gamma_beta_ratio": None, "alpha": None, "length_normalization": True},
    "epsilon-dpo": {"beta": None, "epsilon": None},
    "rmipo": {"beta": 2.0, "fidelity": "release"},
}
THEIRS = {"tau": "beta", "length_normalization": "ln"}
# Recipes have these, and their code doesn't read them.
UNREAD = {"simper": ("beta", "gamma_beta_ratio"), "rmipo": ("gamma_beta_ratio",)}
SFT_LOSSES = ("nll", "dft", "chunked_nll")  # TRL's


def translate(values: Values) -> tuple[Values, list[str]]:
    """The values of a file with the keys of other repositories replaced, and the notices to print. Raises ValueError."""
    new = {RENAMED[key]: value for key, value in values.items() if key in RENAMED and value is not None}
    if "dataset_mixer" in values:
        new["datasets"] = _mixer(values)
    if "dataset_mixture" in values:
        mixture = _rename(values["dataset_mixture"], MIXTURE)
        new |= mixture | {"datasets": [_rename(entry, MIXTURE) for entry in mixture["datasets"]]}
    values = {key: value for key, value in values.items() if key not in RENAMED.keys() | DATA}
    if "objective" not in values and values.get("loss_type", "nll") not in SFT_LOSSES:
        new["objective"] = _objective(values)
        if "max_length" in values:  # TRL has no limit of its own for prompts
            values.setdefault("max_prompt_length", values["max_length"] - 1)
    notices = [f"{key}: {value} (translated from another repository's keys)" for key, value in new.items()]
    notices += [f"{key}: {values.pop(key)} ignored: it has no effect here" for key in IGNORED if key in values]
    return values | new, notices


def _objective(values: Values) -> Values:
    """The block that `loss_type` and its keys mean; takes them out of `values`."""
    given = values.pop("loss_type")
    loss = given[0] if isinstance(given, list) and len(given) == 1 else str(given)
    if loss not in OBJECTIVES:
        raise ValueError(f"loss_type is {loss}: expected one of {', '.join(OBJECTIVES)}, or an objective block")
    for key in UNREAD.get(loss, ()):
        values.pop(key, None)
    block = {key: values.pop(THEIRS.get(key, key), default) for key, default in OBJECTIVES[loss].items()}
    block["name"] = "dpo" if loss == "sigmoid" else loss
    if loss == "simpo":
        block["gamma"] = block["beta"] * values.pop("gamma_beta_ratio")
    return block


def _mixer(values: Values) -> list[Values]:
    """The entries that `dataset_mixer: {id: share}`, `dataset_splits: [train_x, test_x]`, `dataset_configs: [...]` mean."""
    shares, splits = values["dataset_mixer"], values.get("dataset_splits", ["train", "test"])
    configs = values.get("dataset_configs", [None] * len(shares))
    test = [split for split in splits if "test" in split]
    (train,) = set(splits) - set(test)  # ValueError for several
    entries = [
        {"path": path, "name": config, "split": train, "test_split": test[0] if test else None, "weight": share}
        for (path, share), config in zip(shares.items(), configs, strict=True)
    ]
    return [_rename(entry, {}) for entry in entries]


def _rename(block: Values, names: dict[str, str]) -> Values:
    """`block` without the keys that are null, of which `names` has other names."""
    return {names.get(key, key): value for key, value in block.items() if value is not None}
