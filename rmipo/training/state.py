"""The running statistics of an objective, in a checkpoint."""

import json
from pathlib import Path

import torch

OBJECTIVE_STATE = "objective_state.json"


def save_objective_state(checkpoint: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Write the 0-dimensional tensors of `state` beside the weights of a checkpoint."""
    values = {name: value.tolist() for name, value in state.items()}
    (Path(checkpoint) / OBJECTIVE_STATE).write_text(json.dumps(values))


def load_objective_state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """What `save_objective_state` wrote, bit for bit."""
    saved = json.loads((Path(checkpoint) / OBJECTIVE_STATE).read_text())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()}
