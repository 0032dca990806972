"""A private Slurm of two nodes on this machine, without privileges: Debian's slurm-wlm and munge."""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
CONFIG = """
ClusterName=local
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
# The second half: a requeued job may start again after that many seconds, instead of two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
ReturnToService=2
MpiDefault=none
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=1,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def installed() -> bool:
    return all(shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") for program in PROGRAMS)


@contextlib.contextmanager
def cluster(folder: Path):
    """Environment in which sbatch, scontrol and squeue talk to a fresh cluster; stopped at the end."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, user=getpass.getuser(), ports=free_ports(3)).lstrip()
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *munge, f"--socket={folder}/munge.socket"],
        ["slurmctld", "-D", "-f", str(config)],
        ["slurmd", "-D", "-N", "n1", "-f", str(config)],
        ["slurmd", "-D", "-N", "n2", "-f", str(config)],
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}-{len(daemons)}.out", "w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(0.5)
        wait_for(lambda: slurm(environment, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 60)
        yield environment
    finally:
        slurm(environment, "scancel", "--user", getpass.getuser())
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def slurm(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition, timeout: float):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.2)
    raise TimeoutError(f"waited {timeout:.0f} seconds in vain")
