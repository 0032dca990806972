"""The program of `make compare`: search, train, report."""

import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from rmipo.compare.log import Log, best_rates, execute_all, report_runs, search_runs
from rmipo.compare.study import Study
from rmipo.compare.trial import METHODS, READINGS
from rmipo.launch.choices import choose_stages
from rmipo.launch.pipeline import load_steps
from rmipo.launch.sweep import load_sweep
from rmipo.recipe.load import ConfigError, Recipe
from rmipo.record import environment, recorded_run
from rmipo.reporting import comparison
from rmipo.run.lock import locked


def compare(env: dict[str, str]) -> int:
    ###################
    # What is compared
    ###################
    model, _ = choose_stages({**env, "STAGE": ""})
    rates = load_sweep("rmipo", model).parameters["learning_rate"]
    study = Study(model, env.get("DATA", ""), env.get("ARGS", ""))
    swaps_labels = not study.data and Path(f"recipes/{model}/world.yaml").is_file()
    methods, seeds, noises, workers = read_choices(env, study.workers, swaps_labels)
    for run in (*search_runs(methods, rates), *report_runs(methods, {}, seeds, noises)):
        study.check(run)
    (ours,) = load_steps(model, ["rmipo"], {**env, "METHOD": "rmipo"})
    make_sft_model(model, ours.recipe, env)
    ours.recipe.parse(world_size=1)
    suffix = Path(ours.recipe.values["output_dir"]).name.removeprefix("rmipo")  # tells other people's pairs apart
    folder = Path(f"outputs/{model}/compare{suffix}")
    with locked(folder, "MODEL"):
        return compare_in(folder, study, methods, rates, seeds, noises, workers)


def compare_in(
    folder: Path,
    study: Study,
    methods: list[str],
    rates: list[float],
    seeds: list[int],
    noises: list[float],
    workers: int,
) -> int:
    log, facts = Log(folder / "runs.jsonl", study), environment()
    searches = search_runs(methods, rates)

    ###################
    # Search, then train
    ###################
    total = len(searches) + (len(methods) + 1) * len(seeds) * len(noises)
    print(f"{total} runs: {len(methods)} methods x {len(rates)} learning rates; {len(seeds)} seeds x noise {noises}")
    with tqdm(total=total, unit="run", smoothing=0) as bar:

        def finished(runs: list) -> list[dict]:
            known, lines = {run for run in runs if log.find(run)}, {}
            for run, line in execute_all(log, runs, workers, facts):
                bar.initial += run in known  # so that the ETA is that of a run, not of a line read
                bar.update()
                bar.set_postfix_str(str(run))
                lines[run] = line
            return [lines[run] for run in runs]

        searched = finished(searches)
        best = best_rates(searched, study.task.selection_metric)
        lines = finished(report_runs(methods, best, seeds, noises))

    ###################
    # Report
    ###################
    rows = comparison.summarize(lines, study.task.selection_metric)
    text = comparison.report(rows, lines, searched, study.task.selection_metric)
    print(text)
    for path in comparison.write(folder, text, rows, lines):
        print(path)
    return 0


def make_sft_model(model: str, recipe: Recipe, env: dict[str, str]) -> None:
    """Train the one model that all runs start from, if it is this setting's own and not there yet."""
    start = recipe.values["model_name_or_path"]
    if not Path(f"recipes/{model}/sft.yaml").is_file():
        return
    (sft,) = load_steps(model, ["sft"], {"DATA": env.get("DATA", "")})
    run = recorded_run(start)
    if start == sft.recipe.values["output_dir"] and not (run and run["finished"]):
        print("the SFT model comes first", flush=True)
        own = {"STAGE": "sft", "METHOD": "", "ARGS": ""}
        if subprocess.run([sys.executable, "scripts/launch.py"], env=env | own, check=False).returncode:
            raise ConfigError(f"make train MODEL={model} STAGE=sft failed; its messages are above")


def read_choices(
    env: dict[str, str], default_workers: int, swaps_labels: bool
) -> tuple[list[str], list[int], list[float], int]:
    """METHODS, SEEDS, NOISE (0 unless the setting `swaps_labels`) and WORKERS. Raises ConfigError with all that is wrong."""
    known = (*METHODS, *READINGS)
    methods = env["METHODS"].replace(",", " ").split() if env.get("METHODS") else list(METHODS)
    problems = [] if methods else [f"METHODS={env['METHODS']!r} names none of {', '.join(known)}"]
    problems += [f"METHODS: {name!r} is not one of {', '.join(known)}" for name in methods if name not in known]
    values = {"SEEDS": env.get("SEEDS") or "0,1,2", "NOISE": env.get("NOISE") or ("0,0.15" if swaps_labels else "0")}
    values["WORKERS"] = env.get("WORKERS") or str(default_workers)
    types = {"SEEDS": int, "NOISE": float, "WORKERS": int}
    read = {}
    for name, text in values.items():
        try:
            read[name] = [types[name](part) for part in text.split(",")]
        except ValueError:
            problems.append(f"{name}={text!r}: expected numbers such as {'0,0.15' if name == 'NOISE' else '0,1,2'}")
    shares = read.get("NOISE", [])
    if not all(0 <= share < 0.5 for share in shares):
        problems.append(f"NOISE={values['NOISE']!r}: expected shares below 0.5")
    if any(shares) and not swaps_labels:
        problems.append(f"NOISE={values['NOISE']!r}: only the labels of the tiny world are swapped; leave it out")
    if "WORKERS" in read and (len(read["WORKERS"]) > 1 or read["WORKERS"][0] < 1):
        problems.append(f"WORKERS={values['WORKERS']!r}: expected one number, 1 or more")
    if problems:
        raise ConfigError("\n  ".join(["the comparison can't start:", *problems]))
    return (
        [name for name in known if name in methods or name == "rmipo"],
        read["SEEDS"],
        read["NOISE"],
        read["WORKERS"][0],
    )
