"""A loss that is NaN or infinite ends the run on all processes together, with the rows it came from."""

import json
from pathlib import Path

import torch

from rmipo.errors import UserError
from rmipo.training.batching import PackedMicroBatch
from rmipo.training.distributed import Processes


class NonFiniteLossError(UserError, RuntimeError):
    """The loss of some pair is NaN or infinite; the message names the file with the row numbers."""


def raise_if_not_finite(
    losses: list[torch.Tensor],
    micro_batches: list[PackedMicroBatch],
    processes: Processes,
    output_dir: str | Path,
    step: int,
) -> None:
    """Stop all processes together if a loss of this step is NaN or infinite: one synchronisation per optimizer step.

    Args:
        losses: `(real pairs,)` of each micro-batch of this process.

    Raises:
        NonFiniteLossError: with those pairs written to a file in `output_dir`.
    """
    bad = torch.stack([~loss.isfinite().all() for loss in losses]).any()
    if not processes.gather(bad.reshape(1)).any():
        return
    pairs = [
        {"row": row, "loss": str(value)}
        for micro_batch, loss in zip(micro_batches, losses, strict=True)
        for row, value, finite in zip(micro_batch.rows, loss.tolist(), loss.isfinite().tolist(), strict=False)
        if not finite
    ]
    # Each process writes its own: the pairs are on different machines.
    path = Path(output_dir) / f"non_finite_rank{processes.rank}.json"
    rows = [micro_batch.rows for micro_batch in micro_batches]
    path.write_text(json.dumps({"step": step, "pairs": pairs, "rows": rows}, indent=1))
    raise NonFiniteLossError(
        f"the loss of step {step} is not finite; the rows of its pairs are in {path}. Look at those rows, or lower "
        "learning_rate, and train into another output_dir"
    )
