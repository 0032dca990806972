"""How a training script ends and what it prints besides its own lines."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import torch

from rmipo.errors import UserError

EXIT_USER_ERROR = 2
NOISY = r"(torch\.distributed|transformers|accelerate|deepspeed|trl|peft)(\.|$)"


@contextlib.contextmanager
def program() -> Iterator[None]:
    """Around a script's `main`: a UserError ends it with its message and exit code 2; libraries are kept quiet."""
    # Deprecations inside and between libraries whose versions are pinned: nothing that a user could act on.
    warnings.filterwarnings("ignore", ".*deprecated", FutureWarning, NOISY)
    # Accumulation is ours (see `PreferenceTrainer.training_step`) or TRL's, and DeepSpeed is told so.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # left to the interpreter's end, its threads can abort the process
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
