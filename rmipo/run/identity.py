"""What makes two starts the same run, and in what two runs differ."""

import json

# Keys of a recipe that may change between the starts of a run: no weight, metric or checkpoint depends on them.
WITHOUT_EFFECT = {
    f"recipe.{key}"
    for key in (
        "ddp_timeout", "memory_check", "save_total_limit", "warn_chosen_logp_drop", "warn_repetition",
        "warn_grad_norm_ratio", "dataset_num_proc", "dataloader_num_workers", "report_to", "run_name", "push_to_hub",
        "hub_model_id", "hub_private_repo", "hub_revision",
    )
}  # fmt: skip


def run_identity(recipe: dict, fingerprints: dict[str, str], world_size: int) -> dict:
    """The resolved recipe, the fingerprints of data and initial model, and the number of processes, as JSON has them."""
    identity = {"recipe": recipe, "fingerprints": fingerprints, "world_size": world_size}
    return json.loads(json.dumps(identity, default=str))


def differences(found: dict, expected: dict, prefix: str = "") -> list[str]:
    """`key: found, now expected` for every leaf in which two identities differ and that could change a run's results."""
    lines = []
    # A recipe's difference explains more than the data's fingerprint.
    for key in sorted(found.keys() | expected.keys(), key=lambda key: (key == "fingerprints", key)):
        there, here = found.get(key), expected.get(key)
        if f"{prefix}{key}" in WITHOUT_EFFECT:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key}: {there}, now {here}")
    return lines
