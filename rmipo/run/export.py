"""What a finished run leaves to be used: the model, checked tensor by tensor, its card, and an upload if asked for."""

import json
from pathlib import Path

import httpx2
import transformers
import yaml
from accelerate import init_empty_weights
from huggingface_hub import HfApi, RepoUrl
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from rmipo.errors import UserError
from rmipo.files import TEMPORARY
from rmipo.objectives.papers import PAPERS
from rmipo.record import recorded_run
from rmipo.run.lock import LOCK_FILE
from rmipo.training.resuming import gather_at_the_end

SHOWN = 5  # tensors named per kind of mistake
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CARD = "README.md"
NOT_UPLOADED = ["checkpoint-*", f"*{TEMPORARY}", LOCK_FILE, "non_finite_rank*.json"]

HUB_ERRORS = (OSError, ValueError, httpx2.TransportError)  # no login, no such name, no network


class ExportError(UserError, RuntimeError):
    """The saved weights are not the model's, or can't be uploaded; the message says which, or why."""


def save(trainer: Trainer) -> None:
    """Save model, tokenizer and configurations into the run's folder, and verify the weights. Every process takes part."""
    folder = Path(trainer.args.output_dir)
    gather_at_the_end(trainer)
    trainer.save_model(_internal_call=True)  # not uploaded yet: unverified, and without its card
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink()  # a pickle; run.json has the same
        model = trainer.accelerator.unwrap_model(trainer.model)
        peft_config = model.active_peft_config if isinstance(model, PeftModel) else None
        verify_export(folder, model.config, peft_config)


def verify_export(folder: str | Path, config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> int:
    """Compare the saved tensors with those that a model of `config` (or its adapter) has; returns how many there are.

    ZeRO-3 can write empty tensors or leave some out, and loading such a folder only warns.

    Raises:
        ExportError: tensors are missing, unknown, of another shape, or of another dtype than the configuration says.
    """
    folder = Path(folder)
    found = saved_tensors(folder)
    with init_empty_weights():
        # Not by AutoModel: while ZeRO-3 is on, that divides what it makes over the processes.
        model = getattr(transformers, config.architectures[0])(config)
        tied = set(model.all_tied_weights_keys)
        state = model.state_dict()
        if peft_config is not None:
            state = get_peft_model_state_dict(get_peft_model(model, peft_config))
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = {
        "missing": sorted(expected.keys() - found.keys() - tied),
        "not of this model": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} is {shape}, not {expected[name]}"
            for name, (shape, _) in sorted(found.items())
            if name in expected and shape != expected[name]
        ],
    }
    if peft_config is None:  # adapters are trained and saved in float32
        dtype = str(config.dtype).removeprefix("torch.")
        problems[f"not {dtype}"] = [f"{name} is {kind}" for name, (_, kind) in sorted(found.items()) if kind != dtype]
    lines = [f"- {len(names)} {kind}: {'; '.join(names[:SHOWN])}" for kind, names in problems.items() if names]
    if lines:
        raise ExportError(
            f"{folder}: the saved weights can't be used. Expected the {len(expected)} tensors of {config.model_type}, "
            f"found {len(found)}:\n" + "\n".join(lines) + "\nThe weights are whole in the last checkpoint. Under "
            "ZeRO-3 its zero_to_fp32.py joins them; check stage3_gather_16bit_weights_on_model_save: true"
        )
    return len(found)


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor in the folder's safetensors, read from their headers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_slice(name)
                kind = tensor.get_dtype()
                found[name] = tuple(tensor.get_shape()), DTYPES.get(kind, kind)
    return found


def write_model_card(folder: str | Path) -> Path:
    """`README.md` of a finished run: what was trained on what, how, with which result, and what to cite."""
    folder = Path(folder)
    run = recorded_run(folder)
    recipe, results = run["recipe"], run["results"]
    preference = "objective" in recipe
    paper = PAPERS[recipe["objective"]["name"]] if preference else None
    method = f"{paper.name} (preference optimization)" if preference else "Supervised fine-tuning"
    sources = [recipe["dataset_name"]] if recipe.get("dataset_name") else [d["path"] for d in recipe["datasets"]]
    base = recipe["model_name_or_path"]
    # The hub links names of its own; a folder of this machine means nothing there.
    header = {
        "library_name": "peft" if recipe.get("use_peft") else "transformers",
        "base_model": [name for name in [base] if not Path(name).exists()],
        "datasets": [name for name in sources if not Path(name).exists()],
        "tags": ["rmipo", "preference-optimization" if preference else "sft"],
    }
    rows = [
        f"| {name} | {value:.4g} |"
        for name, value in sorted(results.items())
        if isinstance(value, int | float) and not name.endswith(("_runtime", "_per_second"))
    ]
    citation = f"\n## Citation\n\n```bibtex\n{paper.citation}\n```\n" if paper else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    text = f"""---
{yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False)}---

# {folder.resolve().parent.name}: {folder.resolve().name}

{method} of `{base}` on {", ".join(f"`{name}`" for name in sources)}.

## Results

{"Held-out data after training, in nats where they are log-probabilities." if rows else "Nothing was held out."}

| metric | value |
|---|---|
{chr(10).join(rows)}

## Recipe

Trained on {run["world_size"]} x {run["hardware"][0]}, commit {run["commit"]}, with {versions}.

```yaml
{yaml.safe_dump(recipe, sort_keys=False, width=120)}```

Fingerprints of the tokenised data: {json.dumps(run["fingerprints"])}
{citation}"""
    path = folder / CARD
    path.write_text(text)
    return path


def make_repository(args: TrainingArguments) -> RepoUrl:
    """The repository that `hub_model_id` names, made if it isn't there. Raises HUB_ERRORS."""
    return HfApi().create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True)


def push(args: TrainingArguments) -> str:
    """Upload the run's folder without its checkpoints to the repository that `hub_model_id` names; returns its URL.

    Raises ExportError where the hub doesn't take it.
    """
    try:
        return HfApi().upload_folder(
            repo_id=make_repository(args).repo_id,
            folder_path=args.output_dir,
            revision=args.hub_revision,
            commit_message="Model, card and record of its training",
            ignore_patterns=NOT_UPLOADED,
        )
    except HUB_ERRORS as error:
        raise ExportError(
            f"{args.output_dir} holds the finished run, but its upload to {args.hub_model_id} failed: "
            f"{str(error).splitlines()[0]}. Check the network and the login; the same command then uploads it"
        ) from error
