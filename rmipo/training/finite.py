"""A loss that is NaN or infinite ends the run on all ranks together, with the rows it came from."""

import json
from pathlib import Path

import torch

from rmipo.errors import UserError
from rmipo.training.distributed import Ranks


class NonFiniteLossError(UserError, RuntimeError):
    """The loss of some pair is NaN or infinite; the message names the file with the row numbers."""


def raise_if_not_finite(
    losses: list[torch.Tensor], batches: list[dict], ranks: Ranks, output_dir: str | Path, step: int
) -> None:
    """Stop all ranks together if a loss of this step is NaN or infinite: one synchronisation per optimizer step.

    Args:
        losses: `(real pairs,)` of each micro-batch of this rank.
        batches: the micro-batches; `rows` are the dataset's row numbers.

    Raises:
        NonFiniteLossError: with those pairs written to a file in `output_dir`.
    """
    bad = torch.stack([~loss.isfinite().all() for loss in losses]).any()
    if not ranks.gather(bad.reshape(1)).any():
        return
    pairs = [
        {"row": row, "loss": str(value)}
        for batch, loss in zip(batches, losses, strict=True)
        for row, value, finite in zip(batch["rows"], loss.tolist(), loss.isfinite().tolist(), strict=False)
        if not finite
    ]
    path = Path(output_dir) / f"non_finite_rank{ranks.rank}.json"
    path.write_text(json.dumps({"step": step, "pairs": pairs, "rows": [b["rows"] for b in batches]}, indent=1))
    raise NonFiniteLossError(
        f"the loss of step {step} is not finite; the rows of its pairs are in {path}. Look at those rows, or lower "
        "learning_rate, and train into another output_dir"
    )
