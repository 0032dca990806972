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
from rmipo.launch import machine
from rmipo.launch.choices import check_choices, choose_stages
from rmipo.launch.machine import Check


def disk_check(step) -> Check:
    from rmipo.plan import preflight
    from rmipo.plan.memory import Sharding

    name = f"disk {Path(step.output_dir).name}"
    try:
        if step.is_done():
            return Check(name, None, f"{step.output_dir} is trained already")
        sharding = Sharding.load(step.sharding) if step.sharding else Sharding("none")
        needed = preflight.disk_needed(step.recipe, preflight.shape_of(step.recipe), sharding)
        free = preflight.check_disk(step.output_dir, needed)
    except UserError as error:
        # A model that isn't here yet is what the check of the models says.
        return Check(name, None if "config.json" in str(error) else False, str(error))
    return Check(name, True, f"{free / 2**30:.0f} GiB free, {needed / 2**30:.1f} needed in {step.output_dir}")


def access_check(kind: str, name: str) -> Check:
    from rmipo.plan import preflight

    if name.startswith("outputs/") and not Path(name).exists():
        return Check(kind, None, f"{name} is made by an earlier stage of make train")
    try:
        return Check(kind, True, preflight.check_access(name, kind))
    except UserError as error:
        return Check(kind, False, str(error))


def all_checks(env: dict[str, str]) -> Iterator[Check]:
    from rmipo.launch.pipeline import load_steps

    steps = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None]
    recipes = [step.recipe.values for step in steps]
    yield from machine.gpu_checks(needed=not all(step.on_cpu for step in steps))
    yield from map(disk_check, steps)
    for kind, key in (("dataset", "dataset_name"), ("model", "model_name_or_path")):
        for name in sorted({recipe[key] for recipe in recipes if recipe.get(key)}):
            yield access_check(kind, name)
    yield machine.tracker_check([recipe.get("report_to") for recipe in recipes])


def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    options = cli.options(__doc__, "MODEL", "STAGE", "METHOD", "DATA", "ARGS", "SHARDING").read()
    env = {**os.environ, "MODEL": "tiny"} | cli.variables(options)
    check_choices(env)
    os.environ["WANDB_SILENT"] = "true"
    failed = False
    for check in all_checks(env):
        print(check.line(), flush=True)
        failed |= check.passed is False and check.needed
    print(f"{env['MODEL']}: {'see FAIL above' if failed else 'ready'}")
    return int(failed)


if __name__ == "__main__":
    cli.run(main)
