"""`make train ... SLURM=1 NODES=4`: the steps of a setting as Slurm jobs, each waiting for the one before."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from rmipo.errors import ConfigError
from rmipo.launch.pipeline import Step

SCRIPT = "scripts/launch.slurm"


def sbatch_command(step: Step, nodes: int, gpus: int, after: str | None = None) -> list[str]:
    """The command line that queues `step` on `nodes` of `gpus` GPUs, to start when the job `after` has succeeded.

    Options in the environment variable SBATCH_ARGS are added.
    """
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--job-name={step.recipe.name}"]
    command += [] if step.on_cpu else [f"--gpus-per-node={gpus}"]
    # Two jobs of one name write into one folder: the later one starts when the earlier one has ended.
    command += [f"--dependency=afterok:{after},singleton" if after else "--dependency=singleton"]
    command += ["--kill-on-invalid-dep=yes"] if after else []
    config = "cpu" if step.on_cpu else str(step.sharding)
    return [*command, *shlex.split(os.environ.get("SBATCH_ARGS", "")), SCRIPT, config, *step.program]


def require_slurm() -> None:
    """Raises ConfigError where jobs can't be queued."""
    if shutil.which("sbatch") is None:
        raise ConfigError("SLURM=1: sbatch is not installed here. Run this on a login node of the cluster")


def submit(step: Step, nodes: int, gpus: int, after: str | None = None) -> tuple[str, Path]:
    """Queue one step; (job id, its log file). Raises ConfigError with Slurm's reason if it refuses the job."""
    require_slurm()
    logs = Path("outputs/slurm")  # Slurm doesn't make the log's folder and would lose the log
    logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(sbatch_command(step, nodes, gpus, after), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"SLURM=1: sbatch refused {step.recipe.name}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    return job, logs / f"{job}.log"
