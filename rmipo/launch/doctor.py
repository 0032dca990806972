"""What a machine has for training: Python, packages, GPUs, logins. One `Check` each, for `make doctor`.

Nothing heavy is imported before its own check: a missing package has to be reported, not raised.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rmipo.plan.compiler import compiler_problem


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


def python_check() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), found, "make with PYTHON=python3.11 or newer")


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
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        fix = (
            "a machine with an NVIDIA GPU, its driver, and torch built for it. On a cluster's login node that is as it "
            "should be: queue the run with make train ... SLURM=1 GPUS=8x80 (each node's GPUs and their GiB), and run make "
            "doctor on a node (srun --gpus=1 make doctor ...). MODEL=tiny trains on a CPU"
        )
        yield Check("GPU", False, f"none visible, {build}", fix, needed)
        return
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    yield Check("GPU", True, f"{count} x {properties[0].name}, {properties[0].total_memory / 2**30:.0f} GiB")
    yield Check("bfloat16", torch.cuda.is_bf16_supported(), "GPU arithmetic", "use Ampere or newer", needed)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Check("NCCL", True, nccl) if count > 1 else Check("NCCL", None, f"{nccl}, unused on one GPU")
    if importlib.util.find_spec("triton") is None:
        problem = "triton is absent: it is part of torch for Linux"
    else:
        problem = compiler_problem()
    yield Check("flex", problem is None, problem or "compiled attention for packed pairs", "", needed)
    flash = importlib.util.find_spec("flash_attn") is not None
    yield Check("flash", flash or None, "flash-attn" if flash else "flash-attn absent: the SFT stage uses SDPA")


# CUDA's major version -> the oldest Linux driver that runs programs built for it, by NVIDIA's compatibility table.
OLDEST_DRIVER = {"12": 525, "13": 580}


def driver_check(built_for: str | None, driver: str | None, needed: bool) -> Check | None:
    """Whether the driver runs what torch is built for (`torch.version.cuda`); None where there is no driver to check."""
    if driver is None:
        return None
    oldest = OLDEST_DRIVER.get((built_for or "").split(".")[0])
    found = (
        f"torch is built for {built_for}, driver {driver}" if built_for else f"torch is built without, driver {driver}"
    )
    fits = oldest is not None and int(driver.split(".")[0]) >= oldest
    fix = (
        (f"a driver of {oldest} or newer, or " if oldest else "")
        + "another build of the pinned torch, from PyTorch's index: .venv/bin/python -m pip install --force-reinstall "
        "torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126 (or the CUDA that `nvidia-smi` shows)"
    )
    return Check("CUDA", fits, found, fix, needed)


def driver_version() -> str | None:
    """As nvidia-smi says it; None where that doesn't answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def quantization_check(needed: bool) -> Check:
    present = importlib.util.find_spec("bitsandbytes") is not None
    found = "bitsandbytes" if present else "bitsandbytes absent"
    return Check("4-bit", present or (False if needed else None), found, "make install EXTRAS=gpu" if needed else "")


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
    if not trackers & {"wandb", "all"}:
        return Check("W&B login", None, "not needed: report_to is not wandb")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("W&B login", None, f"not needed: WANDB_MODE is {os.environ['WANDB_MODE']}")
    import wandb

    fix = "`.venv/bin/wandb login`, or WANDB_MODE=offline, or ARGS='--report_to none'"
    if not wandb.login(prompt=False, verify=False):
        return Check("W&B login", False, "no credentials", fix)
    return attempt("W&B login", lambda: "accepted" if wandb.login(prompt=False) else "", fix, needed=True)


def judge_check() -> Check:
    name = "OPENAI_API_KEY"
    if os.environ.get(name):
        return Check("judges", True, f"{name} is set")
    return Check(
        "judges", None, f"{name} is not set", "set it before make eval's AlpacaEval 2 and MT-Bench; training needs none"
    )
