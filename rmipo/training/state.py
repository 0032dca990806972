"""The running statistics of an objective, in a checkpoint; written last, they also say that it is complete."""

import json
import re
import shutil
from pathlib import Path

import torch

from rmipo.errors import CheckpointError
from rmipo.files import write_atomically

OBJECTIVE_STATE = "objective_state.json"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


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
            # Killed in between, the folder counts as incomplete and not as a checkpoint with files missing.
            (folder / marker).unlink()
            shutil.rmtree(folder)
