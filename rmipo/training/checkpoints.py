"""Checkpoints of both stages' trainers: when one is complete, what a resume must agree with, and what transformers lacks."""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Trainer, TrainerState
from trl import SFTTrainer

from rmipo.errors import CheckpointError
from rmipo.files import write_atomically
from rmipo.fingerprints import rows_fingerprint
from rmipo.training.loading import require_masters

MARKER = "complete.json"  # written last: a checkpoint without it isn't one
# Arguments that the Trainer would take from the checkpoint, or half from it, without a word.
ARGUMENTS = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")
ARGUMENTS += ("weight_decay", "adam_beta1", "adam_beta2")
SAMPLED_ROWS = 256  # of the training data, by which a resumed run knows it again


class ResumableTrainer(Trainer):
    """Completes each checkpoint with a marker when all processes have written. Only then are older ones deleted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.marks: dict = {}  # what the marker says besides the step and the files

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        if self.state.global_step > max_steps:  # its weights would pass for those of a shorter training
            raise CheckpointError(f"the checkpoint is of step {self.state.global_step}, beyond max_steps ({max_steps})")
        # From a checkpoint of the last step the Trainer would train one more: it looks at their number only after each.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _save_checkpoint(self, model, trial) -> None:
        # The Trainer would delete the last complete checkpoint before the new one has its marker.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.complete_checkpoint()

    def complete_checkpoint(self) -> None:
        # Under ZeRO-3 each process writes a share: the marker waits for the slowest.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete(self.args.output_dir, self.state.global_step, self.marks)
            rotate(self.args.output_dir, self.args.save_total_limit, self.state)


class SupervisedTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer of the SFT stage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_masters(self.model, self.accelerator)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL writes one with each checkpoint, and the run writes its own at its end."""


def complete(output_dir: str | Path, step: int, marks: dict) -> None:
    folder = Path(output_dir, f"checkpoint-{step}")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    write_atomically(folder / MARKER, json.dumps({"step": step, "files": files, **marks}))


def marked(checkpoint: str | Path) -> dict:
    """What the marker of a complete checkpoint says."""
    return json.loads((Path(checkpoint) / MARKER).read_text())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, earliest first, complete or not."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in folders if path.name.removeprefix("checkpoint-").isdecimal()), key=step_of)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of complete checkpoints, earliest step first.

    Raises CheckpointError for one that has lost a file since: the Trainer would start its optimizer anew in silence.
    """
    complete = [folder for folder in numbered_checkpoints(output_dir) if (folder / MARKER).exists()]
    for folder in complete:
        if lost := [name for name in marked(folder).get("files", ()) if not (folder / name).exists()]:
            raise CheckpointError(f"{folder} has lost {', '.join(lost)}: restore it, or remove the folder")
    return complete


def rotate(output_dir: str, limit: int | None, state: TrainerState) -> None:
    """Delete complete checkpoints but the best and the `limit` newest of this training.

    Those of later steps were left by an earlier training: they stay.
    """
    earlier = [folder for folder in complete_checkpoints(output_dir) if step_of(folder) <= state.global_step]
    for folder in earlier[: -limit if limit and limit > 0 else 0]:
        if folder != Path(state.best_model_checkpoint or ""):
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its marker first: what a kill leaves of it is none."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def objective_state(checkpoint: str, decisive: dict) -> dict[str, torch.Tensor]:
    """The running statistics of an objective in a checkpoint, bit for bit.

    Raises CheckpointError, naming the differences to `decisive`, where another training wrote it.
    """
    saved = marked(checkpoint)
    then = saved.get("training", {})  # SFT's have none
    if lines := [f"{key}: {then.get(key)}, now {now}" for key, now in decisive.items() if then.get(key) != now]:
        raise CheckpointError("\n  ".join([f"{checkpoint} is of another training. Different there:", *lines]))
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved["state"].items()}


def decisive(trainer: Trainer) -> dict:
    """What a resumed preference training must have in common with the one that saved its checkpoint, in plain values."""
    values = {name: getattr(trainer.args, name) for name in ARGUMENTS}
    values["objective"] = vars(trainer.objective) | {"name": trainer.objective.name}
    values["global_batch_size"] = trainer.global_batch_size
    rows = trainer.train_dataset.tokenized
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))  # all of a large dataset: minutes
    values["pairs"] = f"{len(rows)}, fingerprint {rows_fingerprint(some)}"
    if isinstance(trainer.model, PeftModel):  # an adapter of one base is another one on another
        adapter = trainer.model.active_peft_config
        values["base model"] = trainer.model.get_base_model().config._name_or_path
        values |= {f"adapter's {key}": getattr(adapter, key, None) for key in ("r", "lora_alpha")}
    if trainer.named:
        values["initial model"] = trainer.initial_weights
    return json.loads(json.dumps(values))


def gather_at_the_end(trainer: Trainer) -> None:
    """Have FSDP2 gather the model as it is saved once more. Its checkpoints hold each process's share."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
