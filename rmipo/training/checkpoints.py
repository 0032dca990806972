"""Checkpoints of both stages' trainers: when one is complete, what a resume must agree with, and what transformers lacks."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Trainer

from rmipo.errors import CheckpointError, ConfigError
from rmipo.files import write_atomically
from rmipo.fingerprints import rows_fingerprint

OBJECTIVE_STATE = "objective_state.json"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
SAMPLED_ROWS = 256  # of the training data, by which a resumed run knows it again
# Arguments that the Trainer would take from the checkpoint, or half from it, without a word.
ARGUMENTS = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")
ARGUMENTS += ("weight_decay", "adam_beta1", "adam_beta2")
STARTED = "started"  # the first file of a checkpoint: a folder without it is somebody else's, whatever its name


def save_objective_state(checkpoint: str | Path, state: dict[str, torch.Tensor], decisive: dict) -> None:
    """Write the 0-dimensional tensors of `state` beside the weights of a checkpoint, and what a resume must agree with."""
    values = {name: value.tolist() for name, value in state.items()}
    content = {"state": values, "run": decisive, "files": files_of(Path(checkpoint))}
    write_atomically(Path(checkpoint) / OBJECTIVE_STATE, json.dumps(content))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def load_objective_state(checkpoint: str | Path, decisive: dict) -> dict[str, torch.Tensor]:
    """The state that `save_objective_state` wrote, bit for bit.

    Raises CheckpointError, naming the differences, where another run wrote it.
    """
    saved = json.loads((Path(checkpoint) / OBJECTIVE_STATE).read_text())
    if lines := [
        f"{key}: {saved['run'].get(key)}, now {now}" for key, now in decisive.items() if saved["run"].get(key) != now
    ]:
        raise CheckpointError(
            f"{checkpoint} is of another training. Name another output_dir, or remove it. Different there:\n  "
            + "\n  ".join(lines)
        )
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved["state"].items()}


def complete_checkpoints(output_dir: str | Path, marker: str) -> list[Path]:
    """The folders of checkpoints that have the file `marker`, which is written last; earliest step first.

    Raises CheckpointError for one that has lost a file since: the Trainer would start its optimizer anew in silence.
    """
    complete = [folder for folder in numbered_checkpoints(output_dir) if (folder / marker).exists()]
    for folder in complete:
        files = json.loads((folder / marker).read_text() or "{}").get("files", ())
        if lost := [name for name in files if not (folder / name).exists()]:
            raise CheckpointError(f"{folder} has lost {', '.join(lost)}: restore it, or remove the folder")
    return complete


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders that the Trainer names `checkpoint-<step>`, earliest first. `checkpoint-04` is somebody else's."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def rotate(complete: list[Path], marker: str, limit: int, keep: str | None = None) -> None:
    """Delete the `complete` checkpoints but the `limit` newest and `keep`; the marker goes first."""
    for folder in complete[:-limit]:
        if keep is None or folder != Path(keep):
            delete(folder, marker)


def delete(folder: Path, marker: str) -> None:
    """Delete a checkpoint so that what a kill leaves of it `is_torn`: its marker first, the file STARTED last."""
    (folder / marker).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STARTED:
            path.unlink()
    shutil.rmtree(folder)


def is_torn(folder: Path, marker: str) -> bool:
    """Whether a kill left it, in a save that didn't reach its marker or in a deletion. Both begin or end empty."""
    names = {path.name for path in folder.iterdir()}
    return marker not in names and (STARTED in names or not names)


def start_checkpoint(output_dir: str | Path, step: int) -> None:
    folder = Path(output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).touch()


class EndsWithItsLastStep(Trainer):
    """From a checkpoint of the last step the Trainer would train one more: it looks at their number only after each."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        if self.state.global_step > max_steps:  # its weights would pass for those of a shorter training
            steps = f"{self.state.global_step}, beyond the {max_steps} steps of this training"
            raise ConfigError(f"the checkpoint is of step {steps}: raise max_steps or num_train_epochs")
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _save_checkpoint(self, model, trial) -> None:
        if self.is_world_process_zero():
            start_checkpoint(self.args.output_dir, self.state.global_step)
        super()._save_checkpoint(model, trial)


def decisive(trainer: Trainer) -> dict:
    """What a resumed preference training must have in common with the one that saved its checkpoint, in plain values."""
    rows = trainer.train_dataset.tokenized
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))  # all of a large dataset: minutes
    objective = vars(trainer.objective) | {"name": trainer.objective.name}
    values = {"objective": objective, "pairs": f"{len(rows)}, fingerprint {rows_fingerprint(some)}"}
    if trainer.named:
        values["initial model"] = trainer.reference.model_key
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
