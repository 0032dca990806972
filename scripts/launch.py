"""Train a setting: run its stages one after the other, on the GPUs that are there.

    make train MODEL=tiny
    make train MODEL=llama3-8b-instruct METHOD=dpo ARGS="--learning_rate 5e-7" GPUS=4 DRY=1

Everything is read from environment variables and nothing passes through a shell:
  MODEL     folder in recipes/                      STAGE     sft, rmipo, or all (default)
  METHOD    file in recipes/methods/ or ablations/  DATA      pairs to train on in place of the recipe's
  ARGS      overrides of the last recipe that is run, such as --learning_rate 1e-6, and --overlay files
  GPUS      how many; default: all that are visible SHARDING  file in configs/accelerate/; default: zero3, ddp for LoRA
  DRY=1     print the resolved recipes and the commands, start nothing
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml

from rmipo.config import ConfigError
from rmipo.stages import Step, choose, choose_stages, load_steps, named_files

ROOT = Path(__file__).parent.parent
DRY_GPUS = 4  # shown where no GPU is visible: the hardware of the paper


def main() -> int:
    env, dry = dict(os.environ), os.environ.get("DRY", "0") not in ("", "0")
    os.chdir(ROOT)
    try:
        model, stages = choose_stages(env)
        gpus, sharding = gpu_count(env, dry), env.get("SHARDING", "")
        if sharding:
            choose("SHARDING", sharding, list(named_files("configs/accelerate")), "Files in configs/accelerate")
        steps = load_steps(model, stages, env)
        if dry:
            for step in steps:
                print(f"## {step.stage}\n{describe(step, gpus)}{shlex.join(step.command(gpus, sharding))}\n")
            return 0
        for step in steps:
            step.check(gpus)
        for number in range(len(steps)):
            # Read again, now that the stage before has finished: a Base setting starts from its own SFT model.
            step = load_steps(model, stages, env)[number]
            if step.recipe is not None and step.is_done():
                print(f"## {step.stage}: already trained, see {step.recipe.values['output_dir']}", flush=True)
                continue
            command = step.command(gpus, sharding)
            print(f"## {step.stage}\n{shlex.join(command)}", flush=True)
            if code := run(command):
                print(f"{step.stage} ended with exit code {code}; the same command starts there", file=sys.stderr)
                return code
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def gpu_count(env: dict[str, str], dry: bool) -> int:
    """GPUs to train on; 0 where none is visible."""
    visible, given = torch.cuda.device_count(), env.get("GPUS", "")
    if not given:
        return visible or DRY_GPUS * dry
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"GPUS={given!r}: expected the number of GPUs, such as GPUS=4")
    if visible and int(given) > visible and not dry:
        raise ConfigError(f"GPUS={given}: {visible} are visible here")
    return int(given) if visible or dry else 0


def describe(step: Step, gpus: int) -> str:
    """The recipe as it is trained, its notices, and how the global batch comes about."""
    if step.recipe is None:
        return ""
    processes = step.processes(gpus)
    size, accumulation = step.recipe.batch(processes)
    per_device = size // (processes * accumulation)
    return "".join(
        [
            *(f"# {notice}\n" for notice in step.recipe.notices),
            yaml.safe_dump(step.recipe.resolved(), sort_keys=False, width=120),
            f"# accumulation: {size} = {per_device} per device x {processes} processes x {accumulation} steps\n",
        ]
    )


def run(command: list[str]) -> int:
    """Exit code of `command`; a SIGTERM, of a job queue say, is passed on to it."""
    process = subprocess.Popen(command, env={"WANDB_PROJECT": "rmipo", **os.environ})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
