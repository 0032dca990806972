"""`make train ... SLURM=1 NODES=4`: the stages of a setting as Slurm jobs, each waiting for the one before."""

import os
import shutil
import subprocess
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.launch.choices import sbatch_options

SCRIPT = "scripts/launch.slurm"


def sbatch_command(
    config: str, program: list[str], *, nodes: int, gpus: int, name: str, after: str | None = None
) -> list[str]:
    """The command line that queues one program.

    Args:
        config: file of configs/accelerate/, or "cpu".
        program: script and arguments, e.g. `["scripts/preference.py", "--config", ...]`.
        gpus: of each node; 0 for "cpu".
        name: of the job in the queue; it waits for the user's earlier jobs of that name.
        after: id of the job that has to succeed first.

    Options in the environment variable SBATCH_ARGS are added.
    """
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--job-name={name}"]
    command += [f"--gpus-per-node={gpus}"] if gpus else []
    # Two jobs of one name write into one folder: the later one starts when the earlier one has ended.
    command += [f"--dependency=afterok:{after},singleton" if after else "--dependency=singleton"]
    command += ["--kill-on-invalid-dep=yes"] if after else []
    return [*command, *sbatch_options(os.environ), SCRIPT, config, *program]


def require_slurm() -> None:
    """Raises ConfigError where jobs can't be queued."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "SLURM=1: sbatch is not installed here. Run this on a login node of the cluster, or without SLURM=1"
        )


def submit(config: str, program: list[str], *, name: str, **options) -> tuple[str, Path]:
    """Queue one program; (job id, its log file). Arguments: those of `sbatch_command`.

    Raises:
        ConfigError: no Slurm here, or it refuses the job; quotes Slurm's reason.
    """
    require_slurm()
    logs = Path("outputs/slurm")  # Slurm doesn't make the log's folder and would lose the log
    logs.mkdir(parents=True, exist_ok=True)
    command = sbatch_command(config, program, name=name, **options)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"SLURM=1: sbatch refused {name}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    return job, logs / f"{job}.log"
