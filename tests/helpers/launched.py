"""Programs in processes that are forked from one which has imported their libraries: a launch takes no import.

What torchrun gives its workers (ranks, a meeting point) is given here, and what `accelerate launch` gives them is asked of
accelerate; a few tests start the real launchers.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser

from tests.helpers.paths import ROOT

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.helpers.preloaded"])


@dataclass
class Launched:
    processes: list
    path: Path

    @property
    def output(self) -> str:
        return self.path.read_text()

    def poll(self) -> int | None:
        """The first exit code that isn't 0 once all have ended; None while one runs."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self) -> int:
        for process in self.processes:
            process.join()
        return self.poll()

    def send(self, number: int) -> None:
        """A signal to the processes and to those that they started, such as W&B's."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for victim in (*parent.children(recursive=True), parent):
                    victim.send_signal(number)

    def end(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()


def launch_environment(sharding: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<sharding>.yaml` puts around torchrun, which is left out."""
    command = ["--config_file", str(ROOT / f"configs/accelerate/{sharding}.yaml"), "--main_process_port", "0"]
    command += ["--num_processes", str(processes), "program.py"]
    found = {}
    with mock.patch("torch.distributed.run.run", lambda arguments: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(command))
    return found


def launch(
    command: list[str], processes: int = 1, root: Path = ROOT, sharding: str | None = None, **environment: str
) -> Launched:
    """Start `[script, *arguments]` or `["-c", code, *arguments]`, in `processes` processes that know each other.

    Args:
        sharding: file of configs/accelerate/, as if they were started by `accelerate launch`.
    """
    descriptor, path = tempfile.mkstemp(prefix="launched-", suffix=".log")
    os.close(descriptor)
    environment = (launch_environment(sharding, processes) if sharding else dict(os.environ)) | environment
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        process = _FORKSERVER.Process(target=_run, args=(command, environment | own, path, root))
        process.start()
        started.append(process)
    return Launched(started, Path(path))


def _run(command: list[str], environment: dict[str, str], output: str, root: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.setpgid(0, 0)
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    atexit._clear()  # what the server registered is its own to run, such as the removal of W&B's folder for tables
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {"__name__": "__main__"})
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        # As an interpreter does at its end, and multiprocessing doesn't: W&B waits here until its own process has written.
        atexit._run_exitfuncs()


def wait_until(condition, launched: Launched) -> None:
    while not condition():
        assert launched.poll() is None, launched.output[-3000:]
        time.sleep(0.01)
