"""Train a setting: run its stages one after the other, on the GPUs that are there.

    make train MODEL=tiny
    make train MODEL=llama3-8b-instruct METHOD=dpo ARGS="--learning_rate 5e-7" GPUS=4 DRY=1

Everything is read from environment variables and nothing passes through a shell:
  MODEL     folder in recipes/                      STAGE     sft, rmipo, or all (default)
  METHOD    file in recipes/methods/ or ablations/  DATA      pairs to train on in place of the recipe's
  ARGS      overrides of the last recipe that is run, such as --learning_rate 1e-6, and --overlay files
  GPUS      how many; default: all that are visible SHARDING  file in configs/accelerate/; default: zero3, ddp for LoRA
  SLURM=1   queue the stages with sbatch instead    NODES     how many machines; GPUS are those of each
  DRY=1     print the resolved recipes and the commands, start nothing
A stage that a signal stops saves first and ends with exit code 75: the same command goes on from there.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml

from rmipo import slurm
from rmipo.checkpoints import EXIT_STOPPED, MARKER
from rmipo.config import ConfigError
from rmipo.stages import Step, choose, choose_stages, load_steps, named_files

ROOT = Path(__file__).parent.parent
DRY_GPUS = 4  # shown where no GPU is visible: the hardware of the paper


def main() -> int:
    env = dict(os.environ)
    dry, queued = is_on(env, "DRY"), is_on(env, "SLURM")
    os.chdir(ROOT)
    try:
        model, stages = choose_stages(env)
        nodes, gpus, sharding = node_count(env, queued), gpu_count(env, dry, queued), env.get("SHARDING", "")
        if sharding:
            choose("SHARDING", sharding, list(named_files("configs/accelerate")), "Files in configs/accelerate")
        steps = load_steps(model, stages, env)
        if dry:
            for step in steps:
                command = step.command(gpus, sharding)
                if queued and step.recipe is not None:
                    command = slurm.sbatch_command(**step.job(gpus, nodes, sharding, model))
                print(f"## {step.stage}\n{describe(step, gpus, nodes)}{shlex.join(command)}\n")
            return 0
        for step in steps:
            step.check(gpus, nodes)
            if step.recipe is not None and torch.cuda.is_available():
                from rmipo import preflight  # needs DeepSpeed, which takes seconds to import

                preflight.check_launch(step.recipe, gpus, nodes, sharding)
        if queued:
            return queue(steps, gpus, nodes, sharding, model)
        for number in range(len(steps)):
            # Read again, now that the stage before has finished: a Base setting starts from its own SFT model.
            step = load_steps(model, stages, env)[number]
            if step.recipe is not None and step.is_done():
                print(f"## {step.stage}: already trained, see {step.recipe.values['output_dir']}", flush=True)
                continue
            command = step.command(gpus, sharding)
            print(f"## {step.stage}\n{shlex.join(command)}", flush=True)
            if code := run(command, step.recipe and step.recipe.values["output_dir"]):
                print(f"{step.stage} ended with exit code {code}; the same command starts there", file=sys.stderr)
                return code
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def is_on(env: dict[str, str], name: str) -> bool:
    return env.get(name, "0") not in ("", "0")


def queue(steps: list[Step], gpus: int, nodes: int, sharding: str, model: str) -> int:
    """Submit the stages, each to start when the one before has succeeded; what needs no recipe runs here, before."""
    slurm.require_slurm()
    job = None
    for step in steps:
        if step.recipe is None and job is None:
            if code := run(step.command(gpus, sharding)):
                return code
        elif step.recipe is None:
            print(f"## {step.stage}: after job {job}: {shlex.join(step.command(gpus, sharding))}")
        elif step.is_done():
            print(f"## {step.stage}: already trained, see {step.recipe.values['output_dir']}")
        else:
            job, log = slurm.submit(**step.job(gpus, nodes, sharding, model), after=job)
            print(f"## {step.stage}: job {job}, log {log}")
    return 0


def node_count(env: dict[str, str], queued: bool) -> int:
    given = env.get("NODES") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"NODES={given!r}: expected the number of machines, such as NODES=4")
    if int(given) > 1 and not queued:
        raise ConfigError(f"NODES={given}: several machines are reached through Slurm: add SLURM=1")
    return int(given)


def gpu_count(env: dict[str, str], dry: bool, queued: bool) -> int:
    """GPUs to train on, of each node; 0 where none is visible."""
    visible, given = torch.cuda.device_count(), env.get("GPUS", "")
    if not given:
        return visible or DRY_GPUS * dry
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"GPUS={given!r}: expected the number of GPUs, such as GPUS=4")
    if visible and int(given) > visible and not (dry or queued):
        raise ConfigError(f"GPUS={given}: {visible} are visible here")
    return int(given) if visible or dry or queued else 0


def describe(step: Step, gpus: int, nodes: int) -> str:
    """The recipe as it is trained, its notices, and how the global batch comes about."""
    if step.recipe is None:
        return ""
    processes = step.processes(gpus, nodes)
    size, accumulation = step.recipe.batch(processes)
    batch = f"{size} = {size // (processes * accumulation)} per device x {processes} processes x {accumulation} steps"
    if tokens := step.recipe.values.get("max_tokens_per_micro_batch"):
        batch = f"{size} over {processes} processes, in rows of at most {tokens} tokens"
    return "".join(
        [
            *(f"# {notice}\n" for notice in step.recipe.notices),
            yaml.safe_dump(step.recipe.resolved(), sort_keys=False, width=120),
            f"# batch: {batch}\n",
        ]
    )


def run(command: list[str], output_dir: str | None = None) -> int:
    """Exit code of `command`. A SIGTERM, of a job queue say, is passed on to it; if it then saves, the code is 75."""
    asked = []

    def stop(number, frame):
        asked.append(time.time())
        process.terminate()

    process = subprocess.Popen(command, env={"WANDB_PROJECT": "rmipo", **os.environ})
    signal.signal(signal.SIGTERM, stop)
    code = process.wait()
    if code and asked and output_dir:  # the launcher of several processes turns their code into 1
        saved = [marker.stat().st_mtime for marker in Path(output_dir).glob(f"checkpoint-*/{MARKER}")]
        code = EXIT_STOPPED if max(saved, default=0) >= asked[0] else code
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
