"""What processes tell each other."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils.cpp_extension
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

COMPILING = 600  # seconds that no compilation of DeepSpeed's extensions takes


def free_compilations() -> None:
    """Before DeepSpeed is used: wait for compilations that are running, and remove locks that killed ones left.

    torch itself waits for a lock without end and without a word.
    """
    # As torch.utils.cpp_extension has it.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or torch.utils.cpp_extension.get_default_build_root())
    with PartialState().local_main_process_first():
        for lock in root.rglob("lock"):
            with contextlib.suppress(FileNotFoundError):  # it ended
                end = lock.stat().st_mtime + COMPILING
                if end > time.time():
                    PartialState().print(
                        f"waiting for the compilation that holds {lock}; if none is running, remove it"
                    )
                while end > time.time() and lock.exists():
                    time.sleep(1)
                lock.unlink()


def gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate `values` of all processes along dim 0, in the order of their ranks; the lengths may differ."""
    if PartialState().num_processes == 1:
        return values
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
