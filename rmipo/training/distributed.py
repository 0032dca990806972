"""What processes tell each other."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


def gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate `values` of all processes along dim 0, in the order of their ranks; the lengths may differ."""
    # As objects: accelerate gathers tensors of one shape only.
    return torch.cat(gather_object([values.cpu()])).to(values.device)


def gather_columns(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Per-pair columns of all micro-batches and processes: `{name: (pairs,)}` on the CPU."""
    # One table and one exchange; sorted, as processes must agree on the order of its columns.
    names = sorted(batches[0])
    table = torch.cat([torch.stack([batch[name] for name in names], dim=1) for batch in batches])
    return dict(zip(names, gather(table).cpu().unbind(1), strict=True))


def on_main_process(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on all: nodes may see a shared file system at different times.

    A ValueError or OSError of the main process is raised on all: else the others would wait for it.
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    value, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return value
