"""What the server of `tests.helpers.launched` imports before it forks."""

import gc
import os
import sys

# The variables that these libraries read as they are imported.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import deepspeed  # noqa: F401
import torch
from trl import SFTTrainer  # noqa: F401

import rmipo.run.export
import rmipo.run.frame  # noqa: F401

torch.set_num_threads(1)
sys.stdout.flush()  # or every forked process would print once more what the imports said
gc.collect()
gc.freeze()  # collections of the forked processes pass over what is here: each would take half a second
