"""`make train`: the stages of a setting, one program after the other on this machine, or queued as Slurm jobs."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import psutil
import torch
import yaml

from rmipo.errors import ConfigError
from rmipo.launch import slurm
from rmipo.launch.choices import choose_sharding, choose_stages, gpus_asked_for, is_on, node_count
from rmipo.launch.environment import training_environment
from rmipo.launch.pipeline import Step, launch_configuration, load_steps
from rmipo.run.checkpoints import MARKER, complete_checkpoints
from rmipo.run.stop import EXIT_STOPPED

DRY_GPUS = 4  # shown where no GPU is visible: the hardware of the paper


def train(env: Mapping[str, str]) -> int:
    """Do what make's variables ask for. Exit code: that of the first stage that fails, 75 of one that was stopped.

    Raises:
        ConfigError, PreflightError: a stage can't be trained so; before anything runs.
    """
    dry, queued = is_on(env, "DRY"), is_on(env, "SLURM")
    model, stages = choose_stages(env)
    nodes, sharding = node_count(env), choose_sharding(env)
    if nodes > 1 and not queued:
        raise ConfigError(f"NODES={nodes}: several machines are reached through Slurm: add SLURM=1")
    steps = load_steps(model, stages, env)
    gpus = gpu_count(env, dry, queued, all(step.on_cpu for step in steps))
    if dry:
        for step in steps:
            command = step.command(gpus, sharding)
            if queued and step.recipe is not None:
                command = slurm.sbatch_command(**step.job(gpus, nodes, sharding))
            print(f"## {step.stage}\n{describe(step, step.processes(gpus, nodes, sharding))}{shlex.join(command)}\n")
        return 0
    for step in steps:
        step.check(gpus, nodes, sharding)
        if not step.on_cpu and not step.is_done():
            check_hardware(step, env, gpus, nodes, sharding)
    if queued:
        return queue(steps, gpus, nodes, sharding)
    env = training_environment(env, sharding, gpus)
    program = Program()
    for number in range(len(steps)):
        if program.stopped_at:
            print(f"stopped before {steps[number].stage}; run the same command to go on from there", file=sys.stderr)
            return EXIT_STOPPED
        # Read again, now that the stage before has finished: a Base setting starts from its own SFT model.
        step = load_steps(model, stages, env)[number]
        command = step.command(gpus, sharding)
        print(f"## {step.stage}\n{shlex.join(command)}", flush=True)
        if code := program.run(command, step.recipe and step.recipe.values["output_dir"], env):
            print(
                f"{step.stage} ended with exit code {code}; run the same command to go on from there", file=sys.stderr
            )
            return code
    return 0


def check_hardware(step: Step, env: Mapping[str, str], gpus: int, nodes: int, sharding: str) -> None:
    """Raises PreflightError if memory or disk are too small; on Slurm's nodes as far as GPUS describes them."""
    from rmipo.plan import preflight  # seconds, and DRY=1 needs none of it
    from rmipo.plan.memory import Hardware, Sharding

    if not is_on(env, "SLURM"):
        hardware = dataclasses.replace(preflight.local_hardware(), gpus_per_node=gpus)
    elif "x" in env["GPUS"]:
        hardware = Hardware.parse(env["GPUS"], nodes)
    else:
        print(f"## {step.stage}: memory is not checked before the job starts: GPUS={gpus}x80 (GiB of one) would")
        return
    launch = launch_configuration(step.recipe, sharding)
    preflight.check_launch(step.recipe, hardware, Sharding.load(launch))


def queue(steps: list[Step], gpus: int, nodes: int, sharding: str) -> int:
    """Submit the stages, each to start when the one before has succeeded; what needs no recipe runs here, before."""
    slurm.require_slurm()
    job = None
    for step in steps:
        if step.recipe is None and job is None:
            if code := Program().run(step.command(gpus, sharding)):
                return code
        elif step.recipe is None:
            print(f"## {step.stage}: after job {job}: {shlex.join(step.command(gpus, sharding))}")
        elif step.needs_no_start():
            folder = step.recipe.values["output_dir"]
            print(
                f"## {step.stage}: {folder} holds this recipe's finished run (its data and model are not compared here)"
            )
        else:
            job, log = slurm.submit(**step.job(gpus, nodes, sharding), after=job)
            print(f"## {step.stage}: job {job}, log {log}")
    return 0


def gpu_count(env: Mapping[str, str], dry: bool, queued: bool, on_cpu: bool) -> int:
    """GPUs to train on, of each node; 0 where none is visible. What the nodes of a cluster have can't be seen here.

    With SHARDING, processes of a recipe for CPUs.
    """
    visible, count = torch.cuda.device_count(), gpus_asked_for(env)
    if on_cpu and choose_sharding(env):
        return count or 1
    if count is None and queued and not on_cpu:
        raise ConfigError(
            "SLURM=1: GPUS is not set. Name the GPUs of each node and the GiB of one, such as GPUS=8x80: those of this "
            "machine are not those of the nodes"
        )
    if count is None:
        return visible or DRY_GPUS * dry
    if visible and count > visible and not (dry or queued):
        raise ConfigError(f"GPUS={count}: {visible} are visible here")
    return count if visible or dry or queued else 0


def describe(step: Step, processes: int) -> str:
    """The recipe as it is trained, its notices, and how the global batch comes about."""
    if step.recipe is None:
        return ""
    size, accumulation = step.recipe.batch(processes)
    batch = f"{size} = {size // (processes * accumulation)} per device x {processes} processes x {accumulation} steps"
    if tokens := step.recipe.values.get("max_tokens_per_micro_batch"):
        batch = f"{size} over {processes} processes, in packed sequences of at most {tokens} tokens"
    return "".join(
        [
            *(f"# {notice}\n" for notice in step.recipe.notices),
            yaml.safe_dump(step.recipe.resolved(), sort_keys=False, width=120),
            f"# batch: {batch}\n",
        ]
    )


class Program:
    """Runs one program after the other. A SIGTERM, of a job queue say, and Ctrl-C are passed on to the one that runs."""

    def __init__(self):
        self.stopped_at: float | None = None
        self.interrupted = False
        self.process: subprocess.Popen | None = None
        signal.signal(signal.SIGTERM, self._stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number, frame):
        running = self.process is not None and self.process.poll() is None
        if number == signal.SIGINT:
            if not running:
                raise KeyboardInterrupt
            if self.interrupted:
                return self._kill()
            self.interrupted = True
        self.stopped_at = self.stopped_at or time.time()
        if running:
            self.process.send_signal(number)

    def _kill(self) -> None:
        """On a second Ctrl-C: the program and all that it started, in whatever group or session."""
        program = psutil.Process(self.process.pid)
        for process in (*program.children(recursive=True), program):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(
        self, command: list[str], output_dir: str | None = None, env: Mapping[str, str] | None = None, **streams
    ) -> int:
        """Exit code of `command`; 75 if it saved in `output_dir` after a signal."""
        # A group of its own: Ctrl-C reaches it once, through us, and what it started can be ended with it.
        self.process = subprocess.Popen(
            command, env=env or training_environment(os.environ), process_group=0, **streams
        )
        if self.stopped_at:  # the signal came before there was a process to pass it on to
            self.process.terminate()
        code = self.process.wait()
        if self.interrupted:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)  # what it left behind
        if code and self.stopped_at and output_dir:  # the launcher of several processes turns their code into 1
            saved = [(folder / MARKER).stat().st_mtime for folder in complete_checkpoints(output_dir)]
            code = EXIT_STOPPED if max(saved, default=0) >= self.stopped_at else code
        return code if code >= 0 else 128 - code
