"""What a machine has for training: GPUs and logins. One `Check` each, for `make doctor`."""

import os
from collections.abc import Iterator
from typing import NamedTuple


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


def gpu_checks(needed: bool) -> Iterator[Check]:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        fix = "a machine with an NVIDIA GPU; on a login node make train ... SLURM=1 GPUS=8x80. MODEL=tiny needs none"
        yield Check("GPU", False, f"none visible, torch is built for CUDA {torch.version.cuda}", fix, needed)
        return
    properties = torch.cuda.get_device_properties(0)
    yield Check("GPU", True, f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def tracker_check(report_to: list[list[str] | str | None]) -> Check:
    """`report_to`: that of each recipe, which is one tracker, several, or none."""
    trackers = {name for given in report_to for name in ([given] if isinstance(given, str) else given or [])}
    if not trackers & {"wandb", "all"} or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("W&B login", None, "not needed: report_to is not wandb, or WANDB_MODE is offline")
    import wandb

    found = wandb.login(prompt=False, verify=False)  # not over the network: a run opens W&B before it loads its model
    fix = "`.venv/bin/wandb login`, or WANDB_MODE=offline, or ARGS='--report_to none'"
    return Check("W&B login", found, "a key is here" if found else "no credentials", fix)
