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
from rmipo.launch.choices import choose_stages


def checks(env: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name; ok, note or FAIL; what was found, and how to mend it."""
    import torch
    import wandb

    from rmipo.launch.pipeline import load_steps
    from rmipo.plan import preflight
    from rmipo.plan.memory import Sharding

    steps = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None]
    recipes = [step.recipe.values for step in steps]
    if count := torch.cuda.device_count():
        yield "GPU", "ok", f"{count} x {torch.cuda.get_device_name(0)}"
    else:
        fix = "a machine with an NVIDIA GPU; on a login node make train ... SLURM=1 GPUS=8x80. MODEL=tiny needs none"
        yield "GPU", "note" if all(step.on_cpu for step in steps) else "FAIL", f"none visible. Fix: {fix}"

    for step in steps:
        name = f"disk {Path(step.output_dir).name}"
        try:
            if step.is_done():
                yield name, "note", f"{step.output_dir} is trained already"
                continue
            sharding = Sharding.load(step.sharding) if step.sharding else Sharding("none")
            needed = preflight.disk_needed(step.recipe, preflight.shape_of(step.recipe), sharding)
            free = preflight.check_disk(step.output_dir, needed)
            yield name, "ok", f"{free / 2**30:.0f} GiB free, {needed / 2**30:.1f} needed in {step.output_dir}"
        except UserError as error:
            # A model that isn't here yet is what the check of the models says.
            yield name, "note" if "config.json" in str(error) else "FAIL", str(error)

    for kind, key in (("dataset", "dataset_name"), ("model", "model_name_or_path")):
        for name in sorted({recipe[key] for recipe in recipes if recipe.get(key)}):
            try:
                if name.startswith("outputs/") and not Path(name).exists():
                    yield kind, "note", f"{name} is made by an earlier stage of make train"
                else:
                    yield kind, "ok", preflight.check_access(name, kind)
            except UserError as error:
                yield kind, "FAIL", str(error)

    used = any("wandb" in (recipe.get("report_to") or ()) for recipe in recipes)  # one tracker or several
    if not used or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        yield "W&B login", "note", "not needed: report_to is not wandb, or WANDB_MODE is offline"
    elif wandb.login(prompt=False, verify=False):  # not over the network: a run opens W&B before it loads its model
        yield "W&B login", "ok", "a key is here"
    else:
        yield "W&B login", "FAIL", "no credentials. Fix: `.venv/bin/wandb login`, or WANDB_MODE=offline"


@cli.main
def main() -> int:
    env = cli.environment(__file__, __doc__, "MODEL", "STAGE", "METHOD", "DATA", "ARGS", "SHARDING")
    env["MODEL"] = env.get("MODEL") or "tiny"
    choose_stages(env)
    os.environ["WANDB_SILENT"] = "true"
    failed = False
    for name, status, found in checks(env):
        print(f"{status:5} {name:12} {found}", flush=True)
        failed |= status == "FAIL"
    return int(failed)
