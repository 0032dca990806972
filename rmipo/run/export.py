"""What a finished run leaves: the model, checked tensor by tensor, its card and pictures, and an upload if asked for."""

import json
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from accelerate import init_empty_weights
from huggingface_hub import HfApi, ModelCardData
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from rmipo.errors import UserError
from rmipo.files import LOCK_FILE, TEMPORARY
from rmipo.objectives.papers import PAPERS
from rmipo.plots import BLUE, ORANGE, draw_gamma, house_style, panels
from rmipo.plots import save as save_figure
from rmipo.record import read_metrics, recorded_run
from rmipo.training.checkpoints import gather_at_the_end
from rmipo.training.trainer import PreferenceTrainer

SHOWN = 5  # tensors named in the message
NOT_UPLOADED = ["checkpoint-*", f"*{TEMPORARY}", LOCK_FILE, "non_finite_rank*.json"]


class ExportError(UserError, RuntimeError):
    """The saved weights are not the model's; the message says which."""


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


def verify_export(folder: str | Path, config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> None:
    """Compare the saved tensors with those that a model of `config` (or its adapter) has.

    ZeRO-3 can write empty tensors or leave some out, and loading such a folder only warns. Raises ExportError.
    """
    found = saved_tensors(Path(folder))
    with init_empty_weights():
        # Not by AutoModel: while ZeRO-3 is on, that divides what it makes over the processes.
        model = getattr(transformers, config.architectures[0])(config)
        # Tied weights are saved under one of their names.
        tied = set(model.all_tied_weights_keys)
        state = model.state_dict()
        if peft_config is not None:
            state = get_peft_model_state_dict(get_peft_model(model, peft_config))
    dtype = str(config.dtype).removeprefix("torch.")
    if peft_config is not None:  # adapters have a dtype of their own
        found = {name: (shape, dtype) for name, (shape, _) in found.items()}
    expected = {name: (tuple(tensor.shape), dtype) for name, tensor in state.items()}
    names = sorted((expected.keys() | found.keys()) - (tied - found.keys()))
    wrong = [name for name in names if found.get(name) != expected.get(name)]
    if wrong:
        said = [f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in wrong[:SHOWN]]
        raise ExportError(
            f"{folder}: {len(wrong)} saved tensors can't be used: {'; '.join(said)}. Use the last checkpoint"
        )


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every tensor in the folder's safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            # Mapped into memory and not read.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        for name, tensor in tensors.items():
            found[name] = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return found


def write_model_card(folder: str | Path) -> Path:
    """`README.md` of a finished run: what was trained on what, how, with which result, and what to cite."""
    folder = Path(folder)
    run = recorded_run(folder)
    recipe = run["recipe"]
    preference = "objective" in recipe
    name = recipe["objective"]["name"] if preference else None
    paper = PAPERS.get(name)  # none for a loss of one's own
    method = f"{paper.name if paper else name} (preference optimization)" if preference else "Supervised fine-tuning"
    sources = [recipe["dataset_name"]] if recipe.get("dataset_name") else [d["path"] for d in recipe["datasets"]]
    base = recipe["model_name_or_path"]
    # The hub links names of its own; a folder of this machine means nothing there.
    header = ModelCardData(
        library_name="peft" if recipe.get("use_peft") else "transformers",
        base_model=[name for name in [base] if not Path(name).exists()] or None,
        datasets=[name for name in sources if not Path(name).exists()] or None,
        tags=["rmipo", "preference-optimization" if preference else "sft"],
    )
    rows = [
        f"| {name} | {value:.4g} |"
        for name, value in sorted(run["results"].items())
        if isinstance(value, int | float) and not name.endswith(("_runtime", "_per_second"))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    citation = f"\n## Citation\n\n```bibtex\n{paper.citation}\n```\n" if paper else ""
    path = folder / "README.md"
    path.write_text(f"""---
{header.to_yaml()}
---

# {folder.resolve().parent.name}: {folder.resolve().name}

{method} of `{base}` on {", ".join(f"`{name}`" for name in sources)}. Held-out data after training, in nats where they are
log-probabilities:

| metric | value |
|---|---|
{chr(10).join(rows)}

Trained on {run["world_size"]} x {run["hardware"][0]}, commit {run["commit"]}, with {versions}.

```yaml
{yaml.safe_dump(recipe, sort_keys=False, width=120)}```

Fingerprints of the tokenised data: {json.dumps(run["fingerprints"])}
{citation}""")
    return path


def push(args: TrainingArguments) -> str:
    """Upload the run's folder without its checkpoints to the repository that `hub_model_id` names; returns its URL."""
    repository = HfApi().create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True)
    return HfApi().upload_folder(
        repo_id=repository.repo_id,
        folder_path=args.output_dir,
        revision=args.hub_revision,
        commit_message="Model, card and record of its training",
        ignore_patterns=NOT_UPLOADED,
    )


WINDOW = 9  # log lines around each point of a smoothed curve


def plot_run(run_dir: str | Path, trainer: PreferenceTrainer) -> dict[str, Path]:
    """The pictures of a finished run, by name: those for which something was logged or evaluated."""
    pictures = {"curves": plot_curves(run_dir)}
    if trainer.objective.name == "rmipo" and trainer.eval_columns is not None:
        bounds = (trainer.objective.gamma_min, trainer.objective.gamma_max)
        pictures["gamma"] = plot_gamma(trainer.eval_columns["gamma"], bounds, Path(run_dir) / "gamma.png")
    return {name: path for name, path in pictures.items() if path is not None}


@house_style
def plot_curves(run_dir: str | Path) -> Path | None:
    """Margin, win rate, log-prob. of chosen responses and gamma over steps, as `curves.png`; None if none was logged."""
    shown = {
        "reward margin": "rewards/margins",
        "win rate": "rewards/accuracies",
        "log-prob. of chosen (nats/token)": "common/chosen_avg_logp",
        "gamma": "rmipo/gamma_mean",
    }
    # From the file and not from memory: a resumed run's picture shows all of it.
    lines = pd.DataFrame(read_metrics(run_dir))
    shown = {title: key for title, key in shown.items() if key in lines}
    if not shown:
        return None
    figure, axes = panels(min(2, len(shown)), rows=(len(shown) + 1) // 2)
    for axis, (title, key) in zip(axes, shown.items(), strict=False):
        training = lines.dropna(subset=key)  # a line has the metrics of training or of an evaluation
        smooth = training[key].rolling(WINDOW, center=True, min_periods=1).mean()
        axis.plot(training["step"], training[key], color=BLUE, alpha=0.3, label="training")
        axis.plot(training["step"], smooth, color=BLUE, label=f"training, mean of {WINDOW} lines")
        if f"eval_{key}" in lines:
            held_out = lines.dropna(subset=f"eval_{key}")
            axis.plot(held_out["step"], held_out[f"eval_{key}"], "o--", color=ORANGE, label="held out", markersize=4)
        axis.set(title=title, xlabel="optimizer step")
        axis.legend()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    return save_figure(figure, Path(run_dir) / "curves.png", (".png",))[0]


@house_style
def plot_gamma(gamma: torch.Tensor, bounds: tuple[float, float], path: Path) -> Path:
    """Distribution of the margin over pairs. `gamma`: (pairs,); `bounds`: (gamma_min, gamma_max)."""
    figure, (axis,) = panels(1, height=3.0)
    draw_gamma(axis, gamma.double().numpy(), bounds)
    axis.set(xlabel="gamma", title=f"margin of {len(gamma)} held-out pairs")
    return save_figure(figure, path, (".png",))[0]
