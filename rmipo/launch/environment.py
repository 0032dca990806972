"""The environment variables of training processes: the same from `make train` and on the nodes of a Slurm job.

    python -m rmipo.launch.environment CONFIG PROCESSES COMMAND...

replaces itself by COMMAND with them set, as scripts/launch.slurm does on each node. CONFIG is a file of
configs/accelerate/ or "cpu", PROCESSES the number of processes on the node. What the user has set is left as it is.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

DEFAULTS = {
    "WANDB_PROJECT": "rmipo",
    # Seconds between the SIGTERM and the SIGKILL that torch's launcher sends; its 30 save no large model.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "540",
    # Micro-batches differ in length: without it the allocator's blocks fit none of the following ones.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def training_environment(env: Mapping[str, str], config: str = "", processes: int = 1) -> dict[str, str]:
    """`env` and what it leaves unset, for `processes` of this machine that are launched with the file `config`."""
    unset = dict(DEFAULTS)
    if Path(config).stem == "zero3-offload":  # CPUAdam runs on so many threads; torch's launcher would say one
        unset["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // processes))
    return unset | dict(env)


if __name__ == "__main__":
    config, processes, *command = sys.argv[1:]
    os.execvpe(command[0], command, training_environment(os.environ, config, int(processes)))
