"""The program of `make compare`: search, train, report."""

import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from rmipo.compare.log import Log, best_rates, execute_all, report_runs, search_runs
from rmipo.compare.study import Study
from rmipo.compare.trial import METHODS, READINGS
from rmipo.files import locked
from rmipo.launch.choices import choose_stages, whole_number
from rmipo.launch.pipeline import load_steps
from rmipo.launch.sweep import load_sweep
from rmipo.recipe.load import ConfigError, Recipe
from rmipo.record import recorded_run
from rmipo.reporting import comparison


def compare(env: dict[str, str]) -> int:
    ###################
    # What is compared
    ###################
    model, _ = choose_stages({**env, "STAGE": ""})
    rates = load_sweep("rmipo", model).parameters["learning_rate"]
    study = Study(model, env.get("ARGS", ""))
    methods, seeds, noises = read_choices(env, study.swaps_labels)
    workers = whole_number(env, "WORKERS", study.workers)
    searches = search_runs(methods, rates)
    for run in (*searches, *report_runs(methods, {}, seeds, noises)):
        study.check(run)
    (ours,) = load_steps(model, ["rmipo"], {**env, "METHOD": "rmipo"})
    make_sft_model(model, ours.recipe, env)
    ours.recipe.parse(world_size=1)
    # Runs with adapters are another comparison.
    suffix = Path(ours.recipe.values["output_dir"]).name.removeprefix("rmipo")
    folder = Path(f"outputs/{model}/compare{suffix}")

    ###################
    # Search, then train
    ###################
    total, metric = len(searches) + (len(methods) + 1) * len(seeds) * len(noises), study.task.selection_metric
    with locked(folder, "MODEL"):
        log = Log(folder / "runs.jsonl", study)
        print(
            f"{total} runs: {len(methods)} methods x {len(rates)} learning rates; {len(seeds)} seeds x noise {noises}"
        )
        with tqdm(total=total, unit="run", smoothing=0) as bar:
            searched = execute_all(log, searches, workers, bar)
            best = best_rates(searched, metric)
            lines = execute_all(log, report_runs(methods, best, seeds, noises), workers, bar)

        ###################
        # Report
        ###################
        rows = comparison.summarize(lines, metric)
        text = comparison.report(rows, lines, searched, metric)
        print(text)
        for path in comparison.write(folder, text, rows, lines):
            print(path)
    return 0


def make_sft_model(model: str, recipe: Recipe, env: dict[str, str]) -> None:
    """Train the one model that all runs start from, if it is this setting's own and not there yet."""
    start = recipe.values["model_name_or_path"]
    if not Path(f"recipes/{model}/sft.yaml").is_file():
        return
    (sft,) = load_steps(model, ["sft"], {})
    run = recorded_run(start)
    if start == sft.recipe.values["output_dir"] and not (run and run["finished"]):
        print("the SFT model comes first", flush=True)
        own = {"STAGE": "sft", "METHOD": "", "ARGS": ""}
        if subprocess.run([sys.executable, "scripts/launch.py"], env=env | own, check=False).returncode:
            raise ConfigError(f"make train MODEL={model} STAGE=sft failed; its messages are above")


def read_choices(env: dict[str, str], swaps_labels: bool) -> tuple[list[str], list[int], list[float]]:
    """METHODS, SEEDS and NOISE (0 unless the setting `swaps_labels`). Raises ConfigError."""
    known = (*METHODS, *READINGS)
    methods = env["METHODS"].replace(",", " ").split() if env.get("METHODS") else list(METHODS)
    if not methods or not {*methods} <= {*known}:
        raise ConfigError(f"METHODS={env['METHODS']!r}: expected some of {', '.join(known)}")
    seeds, noise = env.get("SEEDS") or "0,1,2", env.get("NOISE") or ("0,0.15" if swaps_labels else "0")
    try:
        found = [int(seed) for seed in seeds.split(",")], [float(share) for share in noise.split(",")]
    except ValueError as error:
        raise ConfigError(f"SEEDS={seeds!r}, NOISE={noise!r}: expected numbers such as 0,1,2 and 0,0.15") from error
    if not all(0 <= share < 0.5 for share in found[1]):
        raise ConfigError(f"NOISE={noise!r}: expected shares below 0.5")
    if any(found[1]) and not swaps_labels:  # runs "with noise" would be trained on clean labels
        raise ConfigError(f"NOISE={noise!r}: only the labels of the tiny world are swapped; leave it out")
    return [name for name in known if name in methods or name == "rmipo"], *found
