"""`make train`: the steps of a setting, one program after the other on this machine, or queued as Slurm jobs."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
import yaml

from rmipo.errors import ConfigError
from rmipo.launch.choices import choose_sharding, choose_stages, gpus_asked_for, is_on, whole_number
from rmipo.launch.environment import training_environment
from rmipo.launch.pipeline import Step, load_steps
from rmipo.recipe.files import NO_GPU
from rmipo.run.callbacks import EXIT_STOPPED
from rmipo.training.checkpoints import MARKER, complete_checkpoints

SLURM_SCRIPT = "scripts/launch.slurm"
DRY_GPUS = 4  # shown where no GPU is visible: the hardware of the paper


def train(env: Mapping[str, str]) -> int:
    """Do what make's variables ask for. Exit code: that of the first step that fails, 75 of one that was stopped.

    Raises ConfigError if a step can't be trained so, before anything runs.
    """
    queued, nodes = is_on(env, "SLURM"), whole_number(env, "NODES", 1)
    if nodes > 1 and not queued:
        raise ConfigError(f"NODES={nodes}: several machines are reached through Slurm: add SLURM=1")
    steps = load_steps(*choose_stages(env), env)
    gpus = gpu_count(env, all(step.on_cpu for step in steps))
    if is_on(env, "DRY"):
        for step in steps:
            show(step, gpus, nodes, queued)
        return 0
    for step in steps:
        if step.recipe:
            # These raise where the global batch can't be divided so, and where the folder holds another run.
            step.recipe.batch(step.processes(gpus, nodes))
            step.is_done()
    if queued:
        return queue(steps, gpus, nodes)
    program, env = Program(), training_environment(env, choose_sharding(env), gpus)
    # Each program reads its recipe again: one that prefers an SFT model of our own finds what the step before it made.
    for step in steps:
        if program.stopped_at:
            print(f"stopped before {step.stage}; run the same command to go on from there", file=sys.stderr)
            return EXIT_STOPPED
        command = step.command(gpus)
        print(f"## {step.stage}\n{shlex.join(command)}", flush=True)
        if code := program.run(command, step.output_dir, env):
            print(f"{step.stage} ended with exit code {code}; the same command goes on from there", file=sys.stderr)
            return code
    return 0


def gpu_count(env: Mapping[str, str], on_cpu: bool) -> int:
    """GPUs to train on, of each node; with SHARDING, processes of a recipe for the CPU. Raises ConfigError."""
    visible, count = torch.cuda.device_count(), gpus_asked_for(env)
    if on_cpu:
        return count or 1
    if count is None and is_on(env, "SLURM"):  # those of a cluster's nodes can't be seen here
        raise ConfigError("SLURM=1: GPUS is not set. Name the GPUs of each node, such as GPUS=8")
    if not (is_on(env, "DRY") or is_on(env, "SLURM")) and (count or 1) > visible:
        raise ConfigError(f"GPUS={count}: {visible} are visible here" if visible else NO_GPU)
    return count or visible or DRY_GPUS


def show(step: Step, gpus: int, nodes: int, queued: bool) -> None:
    """Print the recipe as it would be trained, its notices, its batch, and the command."""
    print(f"## {step.stage}")
    command = step.command(gpus)
    if step.recipe is not None:
        command = sbatch_command(step, nodes, gpus) if queued else command
        print("".join(f"# {notice}\n" for notice in step.recipe.notices), end="")
        print(yaml.safe_dump(step.recipe.values, sort_keys=False, width=120), end="")
        processes = step.processes(gpus, nodes)
        print(f"# batch: {step.recipe.batch(processes)[0]} over {processes} processes")
    print(f"{shlex.join(command)}\n")


def queue(steps: list[Step], gpus: int, nodes: int) -> int:
    """Submit the steps, each to start when the one before has succeeded; what needs no recipe runs here, before."""
    if shutil.which("sbatch") is None:  # before anything is made here
        raise ConfigError("SLURM=1: sbatch is not installed here. Run this on a login node of the cluster")
    job = None
    for step in steps:
        if step.recipe is None and job is not None:
            print(f"## {step.stage}: after job {job}: {shlex.join(step.command(gpus))}")
        elif step.recipe is None:
            if code := Program().run(step.command(gpus)):
                return code
        elif step.is_done() and not step.recipe.values.get("push_to_hub"):  # started again it would only upload
            print(f"## {step.stage}: {step.output_dir} holds this recipe's finished run")
        else:
            job, log = submit(step, nodes, gpus, after=job)
            print(f"## {step.stage}: job {job}, log {log}")
    return 0


def sbatch_command(step: Step, nodes: int, gpus: int, after: str | None = None) -> list[str]:
    """The command line that queues `step` on `nodes` of `gpus` GPUs, to start when the job `after` has succeeded.

    Options in the environment variable SBATCH_ARGS are added.
    """
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--job-name={step.recipe.name}"]
    command += [] if step.on_cpu else [f"--gpus-per-node={gpus}"]
    # Two jobs of one name write into one folder: the later one starts when the earlier one has ended.
    command.append(f"--dependency=afterok:{after},singleton" if after else "--dependency=singleton")
    command += ["--kill-on-invalid-dep=yes"] if after else []
    config = "cpu" if step.on_cpu else str(step.sharding)
    return [*command, *shlex.split(os.environ.get("SBATCH_ARGS", "")), SLURM_SCRIPT, config, *step.program]


def submit(step: Step, nodes: int, gpus: int, after: str | None = None) -> tuple[str, Path]:
    """Queue one step; (job id, its log file). Raises ConfigError with Slurm's reason if it refuses the job."""
    logs = Path("outputs/slurm")  # Slurm doesn't make the log's folder and would lose the log
    logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(sbatch_command(step, nodes, gpus, after), capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"SLURM=1: sbatch refused {step.recipe.name}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    return job, logs / f"{job}.log"


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
        if number == signal.SIGINT and not running:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.interrupted:
            return self._kill()
        self.interrupted |= number == signal.SIGINT
        self.stopped_at = self.stopped_at or time.time()
        if running:
            self.process.send_signal(number)

    def _kill(self) -> None:
        """On a second Ctrl-C: the program and all that it started. (torch's launcher starts each in its own session.)"""
        program = psutil.Process(self.process.pid)
        for process in (*program.children(recursive=True), program):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(
        self, command: list[str], output_dir: str | None = None, env: Mapping[str, str] | None = None, **streams
    ) -> int:
        """Exit code of `command`; 75 if it saved in `output_dir` after a signal."""
        env = env or training_environment(os.environ)
        before = self.stopped_at
        # A group of its own: Ctrl-C reaches it once, through us, and what it started can be ended with it.
        self.process = subprocess.Popen(command, env=env, process_group=0, **streams)
        if self.stopped_at != before:  # a signal that came before there was a process to pass it on to
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        if self.interrupted:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)  # what it left behind
        if code and self.stopped_at and output_dir:  # the launcher of several processes turns their code into 1
            saved = [(folder / MARKER).stat().st_mtime for folder in complete_checkpoints(output_dir)]
            code = EXIT_STOPPED if max(saved, default=0) >= self.stopped_at else code
        return code if code >= 0 else 128 - code
