"""Check what training MODEL needs: one line per check, with its fix. Prints no token and works without a network.

    make doctor [MODEL=llama3-8b-instruct]

`ok`: as it should be. `note`: something else will be used, or nothing needs it. `FAIL`: MODEL can't be trained so; the
exit code is then 1.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from rmipo import cli
from rmipo.errors import UserError
from rmipo.launch.choices import check_choices, choose_stages

Check = tuple[str, str, str]  # name; ok, note or FAIL; what was found, and how to mend it


def gpu_check(needed: bool) -> Check:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        fix = "a machine with an NVIDIA GPU; on a login node make train ... SLURM=1 GPUS=8x80. MODEL=tiny needs none"
        return "GPU", "FAIL" if needed else "note", f"none visible. Fix: {fix}"
    properties = torch.cuda.get_device_properties(0)
    return "GPU", "ok", f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def disk_check(step) -> Check:
    from rmipo.plan import preflight
    from rmipo.plan.memory import Sharding

    name = f"disk {Path(step.output_dir).name}"
    try:
        if step.is_done():
            return name, "note", f"{step.output_dir} is trained already"
        sharding = Sharding.load(step.sharding) if step.sharding else Sharding("none")
        needed = preflight.disk_needed(step.recipe, preflight.shape_of(step.recipe), sharding)
        free = preflight.check_disk(step.output_dir, needed)
    except UserError as error:
        # A model that isn't here yet is what the check of the models says.
        return name, "note" if "config.json" in str(error) else "FAIL", str(error)
    return name, "ok", f"{free / 2**30:.0f} GiB free, {needed / 2**30:.1f} needed in {step.output_dir}"


def access_check(kind: str, name: str) -> Check:
    from rmipo.plan import preflight

    if name.startswith("outputs/") and not Path(name).exists():
        return kind, "note", f"{name} is made by an earlier stage of make train"
    try:
        return kind, "ok", preflight.check_access(name, kind)
    except UserError as error:
        return kind, "FAIL", str(error)


def tracker_check(recipes: list[dict]) -> Check:
    given = [recipe.get("report_to") or [] for recipe in recipes]  # one tracker or several
    trackers = {name for names in given for name in ([names] if isinstance(names, str) else names)}
    if not trackers & {"wandb", "all"} or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return "W&B login", "note", "not needed: report_to is not wandb, or WANDB_MODE is offline"
    import wandb

    if wandb.login(prompt=False, verify=False):  # not over the network: a run opens W&B before it loads its model
        return "W&B login", "ok", "a key is here"
    fix = "`.venv/bin/wandb login`, or WANDB_MODE=offline, or ARGS='--report_to none'"
    return "W&B login", "FAIL", f"no credentials. Fix: {fix}"


def all_checks(env: dict[str, str]) -> Iterator[Check]:
    from rmipo.launch.pipeline import load_steps

    steps = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None]
    recipes = [step.recipe.values for step in steps]
    yield gpu_check(needed=not all(step.on_cpu for step in steps))
    yield from map(disk_check, steps)
    for kind, key in (("dataset", "dataset_name"), ("model", "model_name_or_path")):
        for name in sorted({recipe[key] for recipe in recipes if recipe.get(key)}):
            yield access_check(kind, name)
    yield tracker_check(recipes)


@cli.main
def main() -> int:
    env = cli.environment(__file__, __doc__, "MODEL", "STAGE", "METHOD", "DATA", "ARGS", "SHARDING")
    env["MODEL"] = env.get("MODEL") or "tiny"
    check_choices(env)
    os.environ["WANDB_SILENT"] = "true"
    failed = False
    for name, status, found in all_checks(env):
        print(f"{status:5} {name:12} {found}", flush=True)
        failed |= status == "FAIL"
    print(f"{env['MODEL']}: {'see FAIL above' if failed else 'ready'}")
    return int(failed)
