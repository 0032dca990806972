"""Checkpoints of both stages' trainers: when one is complete, what a resume must agree with, and what transformers lacks."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Trainer
from trl import SFTTrainer

from rmipo.errors import CheckpointError, ConfigError
from rmipo.files import write_atomically
from rmipo.fingerprints import rows_fingerprint
from rmipo.training.loading import require_masters

MARKER = "complete.json"  # written last: a checkpoint without it isn't one
STARTED = "started"  # the first file of a checkpoint: a folder without it is somebody else's, whatever its name
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
SAMPLED_ROWS = 256  # of the training data, by which a resumed run knows it again
# Arguments that the Trainer would take from the checkpoint, or half from it, without a word.
ARGUMENTS = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")
ARGUMENTS += ("weight_decay", "adam_beta1", "adam_beta2")


class ResumableTrainer(Trainer):
    """Completes each checkpoint with a marker when all processes have written. Only then are older ones deleted.

    `marks`: what the marker says besides the step and the files; a run adds its identity.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.marks: dict = {}
        self.limit: int | None = None

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        # The Trainer would delete the last complete checkpoint before the new one has its marker.
        if self.args.save_total_limit is not None:
            self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        if self.state.global_step > max_steps:  # its weights would pass for those of a shorter training
            steps = f"{self.state.global_step}, beyond the {max_steps} steps of this training"
            raise ConfigError(f"the checkpoint is of step {steps}: raise max_steps or num_train_epochs")
        # From a checkpoint of the last step the Trainer would train one more: it looks at their number only after each.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:
            start_checkpoint(self.args.output_dir, self.state.global_step)
        super()._save_checkpoint(model, trial)
        self.complete_checkpoint()

    def complete_checkpoint(self) -> None:
        # Under ZeRO-3 each process writes a share: the marker waits for the slowest.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete(self.args.output_dir, self.state.global_step, self.marks)
            if self.limit is not None and self.limit > 0:  # below 1 the Trainer keeps all, too
                found = complete_checkpoints(self.args.output_dir)
                # Checkpoints of later steps were left by an earlier training: not ours to delete.
                earlier = [folder for folder in found if step_of(folder) <= self.state.global_step]
                rotate(earlier, self.limit, keep=self.state.best_model_checkpoint)


class SupervisedTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer of the SFT stage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_masters(self.model, self.accelerator)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL writes one with each checkpoint, and the run writes its own at its end."""


def start_checkpoint(output_dir: str | Path, step: int) -> None:
    folder = Path(output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).touch()


def complete(output_dir: str | Path, step: int, marks: dict) -> None:
    folder = Path(output_dir) / f"checkpoint-{step}"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_atomically(folder / MARKER, json.dumps({"step": step, "files": files, **marks}))


def marked(checkpoint: str | Path) -> dict:
    """What the marker of a complete checkpoint says."""
    return json.loads((Path(checkpoint) / MARKER).read_text())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders that the Trainer names `checkpoint-<step>`, earliest first. `checkpoint-04` is somebody else's."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of complete checkpoints, earliest step first. A copy under another step's name is not one.

    Raises CheckpointError for one that has lost a file since: the Trainer would start its optimizer anew in silence.
    """
    with_marker = [folder for folder in numbered_checkpoints(output_dir) if (folder / MARKER).exists()]
    complete = [folder for folder in with_marker if marked(folder)["step"] == step_of(folder)]
    for folder in complete:
        if lost := [name for name in marked(folder).get("files", ()) if not (folder / name).exists()]:
            raise CheckpointError(f"{folder} has lost {', '.join(lost)}: restore it, or remove the folder")
    return complete


def rotate(complete: list[Path], limit: int, keep: str | None = None) -> None:
    """Delete the `complete` checkpoints but the `limit` newest and `keep`."""
    for folder in complete[:-limit]:
        if keep is None or folder != Path(keep):
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a checkpoint so that what a kill leaves of it `is_torn`: its marker first, the file STARTED last."""
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STARTED:
            path.unlink()
    shutil.rmtree(folder)


def is_torn(folder: Path) -> bool:
    """Whether a kill left it, in a save that didn't reach its marker or in a deletion. Both begin or end empty."""
    names = {path.name for path in folder.iterdir()}
    return MARKER not in names and (STARTED in names or not names)


def objective_state(checkpoint: str | Path, decisive: dict) -> dict[str, torch.Tensor]:
    """The running statistics of an objective in a checkpoint, bit for bit.

    Raises CheckpointError, naming the differences to `decisive`, where another training wrote it.
    """
    saved = marked(checkpoint)
    then = saved.get("training", {})  # SFT's and older ones have none
    if lines := [f"{key}: {then.get(key)}, now {now}" for key, now in decisive.items() if then.get(key) != now]:
        raise CheckpointError(
            f"{checkpoint} is of another training. Name another output_dir, or remove it. Different there:\n  "
            + "\n  ".join(lines)
        )
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved["state"].items()}


def decisive(trainer: Trainer) -> dict:
    """What a resumed preference training must have in common with the one that saved its checkpoint, in plain values."""
    rows = trainer.train_dataset.tokenized
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))  # all of a large dataset: minutes
    objective = vars(trainer.objective) | {"name": trainer.objective.name}
    values = {"objective": objective, "pairs": f"{len(rows)}, fingerprint {rows_fingerprint(some)}"}
    if trainer.named:
        values["initial model"] = trainer.initial_weights()
    if isinstance(trainer.model, PeftModel):  # an adapter of one base is another one on another
        adapter = trainer.model.active_peft_config
        values["base model"] = trainer.model.get_base_model().config._name_or_path
        values |= {f"adapter's {key}": getattr(adapter, key, None) for key in ("r", "lora_alpha")}
    values |= {name: getattr(trainer.args, name) for name in ARGUMENTS}
    return json.loads(json.dumps(values | {"global_batch_size": trainer.global_batch_size}))


def gather_at_the_end(trainer: Trainer) -> None:
    """Have FSDP2 gather the model as it is saved once more. Its checkpoints hold each process's share."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
