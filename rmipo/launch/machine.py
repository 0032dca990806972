"""What a machine has for training: packages, GPUs, logins. One `Check` each, for `make doctor`.

Nothing heavy is imported before its own check: a missing package has to be reported, not raised.
"""

import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from rmipo.plan.compiler import compiler_problem

# CUDA's major version -> the oldest Linux driver that runs programs built for it, by NVIDIA's compatibility table.
OLDEST_DRIVER = {"12": 525, "13": 580}
OTHER_BUILD = (
    "another build of the pinned torch: .venv/bin/python -m pip install --force-reinstall torch==2.13.0 --index-url "
    "https://download.pytorch.org/whl/cu126"
)


class Check(NamedTuple):
    """`passed`: None where the check says something that nothing depends on. `needed`: MODEL fails without it."""

    name: str
    passed: bool | None
    found: str
    fix: str = ""
    needed: bool = True

    def line(self) -> str:
        failed = self.passed is False and self.needed
        status = "FAIL" if failed else "ok" if self.passed else "note"
        fix = f". Fix: {self.fix}" if self.fix and not self.passed else ""
        return f"{status:5} {self.name:12} {self.found}{fix}"


def package_checks() -> Iterator[Check]:
    for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed"):
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", "make install")


def gpu_checks(needed: bool) -> Iterator[Check]:
    import torch

    if (driver := driver_version()) is not None:
        yield driver_check(torch.version.cuda, driver, needed)
    count = torch.cuda.device_count()
    if count == 0:
        fix = "a machine with an NVIDIA GPU; on a login node make train ... SLURM=1 GPUS=8x80. MODEL=tiny needs none"
        yield Check("GPU", False, f"none visible, torch is built for CUDA {torch.version.cuda}", fix, needed)
        return
    properties = torch.cuda.get_device_properties(0)
    yield Check("GPU", True, f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    problem = compiler_problem()
    yield Check("flex", problem is None, problem or "compiled attention for packed pairs", "", needed)


def driver_check(built_for: str | None, driver: str, needed: bool) -> Check:
    """Whether the driver runs what torch is built for (`torch.version.cuda`)."""
    oldest = OLDEST_DRIVER.get((built_for or "").split(".")[0])
    fits = oldest is not None and int(driver.split(".")[0]) >= oldest
    found = f"torch is built for {built_for}, driver {driver}"
    return Check("CUDA", fits, found, f"a driver of {oldest or 'CUDA'} or newer, or {OTHER_BUILD}", needed)


def driver_version() -> str | None:
    """As nvidia-smi says it; None where that doesn't answer."""
    # Not by torch: where the driver is too old for it, torch says only that there is no GPU.
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def tracker_check(report_to: list[list[str] | str | None]) -> Check:
    """`report_to`: that of each recipe, which is one tracker, several, or none."""
    trackers = {name for given in report_to for name in ([given] if isinstance(given, str) else given or [])}
    if not trackers & {"wandb", "all"} or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("W&B login", None, "not needed: report_to is not wandb, or WANDB_MODE is offline")
    import wandb

    found = wandb.login(prompt=False, verify=False)  # not over the network: a run opens W&B before it loads its model
    fix = "`.venv/bin/wandb login`, or WANDB_MODE=offline, or ARGS='--report_to none'"
    return Check("W&B login", found, "a key is here" if found else "no credentials", fix)
