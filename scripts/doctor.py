"""Check what training MODEL needs: one line per check, with its fix. Prints no token and works without a network.

    make doctor [MODEL=llama3-8b-instruct] [EVAL=1, what make eval needs too; asks the judge for one token]
    make doctor EVAL=1 SETTINGS=my-eval.yaml    # of another judge or other data than the setting's

`ok`: as it should be. `note`: something else will be used, or nothing needs it. `FAIL`: MODEL can't be trained so; the
exit code is then 1.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from rmipo import cli
from rmipo.launch import doctor as machine
from rmipo.launch.choices import check_choices, choose_stages
from rmipo.launch.doctor import Check


def disk_check(step) -> Check:
    from rmipo.launch.pipeline import launch_configuration
    from rmipo.plan import preflight
    from rmipo.plan.memory import GIB, Sharding
    from rmipo.recipe.load import ConfigError

    recipe, folder = step.recipe, step.recipe.values["output_dir"]
    name = f"disk {Path(folder).name}"
    try:
        if step.is_done():
            return Check(name, None, f"{folder} is trained already")
    except ConfigError as error:
        return Check(name, False, str(error))
    free = preflight.check_disk(folder, 0) / GIB
    try:
        shape = preflight.shape_of(recipe)
    except preflight.PreflightError:
        return Check(
            name, None, f"{free:.0f} GiB free; {recipe.values['model_name_or_path']} is not here to compare with"
        )
    needed = preflight.disk_needed(recipe, shape, Sharding.load(launch_configuration(recipe)))
    try:
        preflight.check_disk(folder, needed)
    except preflight.PreflightError as error:
        return Check(name, False, str(error))
    return Check(name, True, f"{free:.0f} GiB free, {needed / GIB:.1f} needed in {folder}")


def access_checks(recipes: list, env: dict[str, str]) -> Iterator[Check]:
    """Models and data; those that a stage of the setting makes are only named."""
    from rmipo.launch.pipeline import maker
    from rmipo.plan import preflight

    wanted = {("model", recipe.values["model_name_or_path"]) for recipe in recipes}
    wanted |= {("dataset", recipe.values["dataset_name"]) for recipe in recipes if recipe.values.get("dataset_name")}
    for kind, name in sorted(wanted):
        if command := maker(name, env["MODEL"], env):
            yield Check(kind, None, f"{name} is made by an earlier stage: {command}")
            continue
        try:
            yield Check(kind, True, preflight.check_access(name, kind))
        except preflight.PreflightError as error:
            yield Check(kind, False, str(error))


def all_checks(env: dict[str, str]) -> Iterator[Check]:
    yield machine.python_check()
    packages = list(machine.package_checks())
    yield from packages
    if not all(check.passed for check in packages):
        return
    from rmipo.launch.pipeline import load_steps

    steps = [step for step in load_steps(*choose_stages(env), env) if step.recipe is not None]
    recipes = [step.recipe for step in steps]
    yield from machine.gpu_checks(any(not recipe.values.get("use_cpu") for recipe in recipes))
    yield machine.quantization_check(any(recipe.values.get("load_in_4bit") for recipe in recipes))
    yield from map(disk_check, steps)
    yield machine.hub_login_check()
    yield from access_checks(recipes, env)
    yield machine.tracker_check([recipe.values.get("report_to") for recipe in recipes])
    if env.get("EVAL", "0") in ("", "0"):
        yield machine.judge_check()
        return
    from rmipo.evaluation import doctor
    from rmipo.evaluation.target import load_settings

    named, own = env.get("SETTINGS"), Path("recipes", env["MODEL"], "eval.yaml")
    yield from doctor.checks(load_settings(Path(named or own), []) if named or own.is_file() else {})


def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    options = cli.options(__doc__, "MODEL", "STAGE", "METHOD", "DATA", "ARGS", "SHARDING", "EVAL", "SETTINGS").read()
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
