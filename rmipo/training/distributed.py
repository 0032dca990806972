"""Gathering per-pair values over processes."""

import torch
from accelerate import Accelerator


class Processes:
    """What objectives with batch statistics, and the metrics, need to know of the other processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate `values` of all processes along dim 0, in the order of their ranks; the lengths may differ."""
        if self.count == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        parts = self.accelerator.gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_columns(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Per-pair columns of all micro-batches and processes: `{name: (pairs,)}` on the CPU."""
        names = sorted(batches[0])
        table = torch.cat([torch.stack([batch[name] for name in names], dim=1) for batch in batches])
        return dict(zip(names, self.gather(table).cpu().unbind(1), strict=True))
