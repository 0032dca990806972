"""The running statistics of an objective, in a checkpoint; written last, they also say that it is complete."""

import json
import re
from pathlib import Path

import torch

from rmipo.files import write_atomically

OBJECTIVE_STATE = "objective_state.json"


def save_objective_state(checkpoint: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Write the 0-dimensional tensors of `state` beside the weights of a checkpoint."""
    values = {name: value.tolist() for name, value in state.items()}
    write_atomically(Path(checkpoint) / OBJECTIVE_STATE, json.dumps(values))


def load_objective_state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """What `save_objective_state` wrote, bit for bit."""
    saved = json.loads((Path(checkpoint) / OBJECTIVE_STATE).read_text())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()}


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint of the latest step in `output_dir`; None if there is none."""
    complete = [state.parent for state in Path(output_dir).glob(f"checkpoint-*/{OBJECTIVE_STATE}")]
    ours = [folder for folder in complete if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return str(max(ours, key=lambda folder: int(folder.name.split("-")[1]))) if ours else None
