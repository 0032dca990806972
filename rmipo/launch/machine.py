"""What a machine has for training: packages, GPUs, logins. One `Check` each, for `make doctor`.

Nothing heavy is imported before its own check: a missing package has to be reported, not raised.
"""

import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rmipo.plan.compiler import compiler_problem

# CUDA's major version -> the oldest Linux driver that runs programs built for it, by NVIDIA's compatibility table.
OLDEST_DRIVER = {"12": 525, "13": 580}


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
        return f"{status:5} {self.name:12} {self.found}" + (
            f". Fix: {self.fix}" if self.fix and not self.passed else ""
        )


def package_checks() -> Iterator[Check]:
    for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed"):
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", "make install")


def gpu_checks(needed: bool) -> Iterator[Check]:
    import torch

    if (driver := driver_check(torch.version.cuda, driver_version(), needed)) is not None:
        yield driver
    count = torch.cuda.device_count()
    if count == 0:
        fix = (
            "a machine with an NVIDIA GPU, its driver, and torch built for it; on a cluster's login node queue the run with "
            "make train ... SLURM=1 GPUS=8x80. MODEL=tiny trains on a CPU"
        )
        yield Check("GPU", False, f"none visible, torch is built for CUDA {torch.version.cuda}", fix, needed)
        return
    properties = torch.cuda.get_device_properties(0)
    yield Check("GPU", True, f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    yield Check("bfloat16", torch.cuda.is_bf16_supported(), "GPU arithmetic", "use Ampere or newer", needed)
    problem = compiler_problem()
    yield Check("flex", problem is None, problem or "compiled attention for packed pairs", "", needed)


def driver_check(built_for: str | None, driver: str | None, needed: bool) -> Check | None:
    """Whether the driver runs what torch is built for (`torch.version.cuda`); None where there is no driver to check."""
    if driver is None:
        return None
    oldest = OLDEST_DRIVER.get((built_for or "").split(".")[0])
    fits = oldest is not None and int(driver.split(".")[0]) >= oldest
    fix = (
        f"a driver of {oldest or 'CUDA'} or newer, or another build of the pinned torch: .venv/bin/python "
        "-m pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    )
    return Check("CUDA", fits, f"torch is built for {built_for}, driver {driver}", fix, needed)


def driver_version() -> str | None:
    """As nvidia-smi says it; None where that doesn't answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hub_login_check() -> Check:
    from huggingface_hub import get_token, whoami

    fix = "`.venv/bin/hf auth login`, or set HF_TOKEN; only gated models need it"
    if get_token() is None:
        return Check("hub login", None, "none", fix)
    return attempt("hub login", lambda: f"as {whoami()['name']}", fix, needed=False)


def attempt(name: str, ask: Callable[[], str], fix: str, needed: bool) -> Check:
    """A check whose answer comes over the network. Of an error only its kind is shown: messages may quote requests."""
    try:
        return Check(name, True, ask())
    except Exception as error:  # any failure to get an answer is the same to the reader
        return Check(name, False, f"unreachable or refused ({type(error).__name__})", fix, needed)


def tracker_check(report_to: list[list[str] | str | None]) -> Check:
    """`report_to`: that of each recipe, which is one tracker, several, or none."""
    trackers = {name for given in report_to for name in ([given] if isinstance(given, str) else given or [])}
    if not trackers & {"wandb", "all"} or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("W&B login", None, "not needed: report_to is not wandb, or WANDB_MODE is offline")
    import wandb

    fix = "`.venv/bin/wandb login`, or WANDB_MODE=offline, or ARGS='--report_to none'"
    if not wandb.login(prompt=False, verify=False):
        return Check("W&B login", False, "no credentials", fix)
    return attempt("W&B login", lambda: "accepted" if wandb.login(prompt=False) else "", fix, needed=True)
