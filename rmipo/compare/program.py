"""The programs of `make compare` and `make margins`: search, train, report. A study is arms of methods that share a search.

`make compare` asks which method is best: every method is an arm, and searches its own learning rate.

`make margins` asks if it is the pair's own margin that helps. RMiPO, RMiPO whose margins are dealt to other pairs
("shuffled"), and SimPO at the mean of RMiPO's margins share the learning rate at which RMiPO is best; methods without margins
are trained once more at the rate that ends nearest to RMiPO's distance from the initial model, if that is another one. Its
grids, as many settings of each method, show how much outcomes depend on tuning.
"""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rmipo.compare.runs import Log
from rmipo.compare.study import INITIAL, METHODS, READINGS, SEARCH_SEED, Study, Trial
from rmipo.errors import ConfigError
from rmipo.files import locked
from rmipo.fingerprints import has_weights
from rmipo.launch.choices import whole_number
from rmipo.launch.sweep import load_sweep
from rmipo.objectives import OBJECTIVES
from rmipo.plots import house_style, panels, save
from rmipo.recipe.files import read_yaml
from rmipo.record import recorded_run
from rmipo.reporting import comparison
from rmipo.reporting.render import markdown_table
from rmipo.reporting.results import OURS, method_label

PRIMARY = "shuffled"  # its contrast with RMiPO was named beforehand


def compare(env: dict[str, str]) -> int:
    study = Study(env["MODEL"], env.get("ARGS", ""))
    methods, seeds, noises = read_choices(env, study.task.swaps_labels)
    rates = load_sweep(OURS, study.model).parameters["learning_rate"]
    arms = {INITIAL: {"learning_rate": None, "methods": [INITIAL]}}
    arms |= {method: {"learning_rate": rates, "methods": [method]} for method in methods}
    return train_and_report(study, "compare", {"arms": arms, "noise": noises}, seeds, env)


def margins(env: dict[str, str]) -> int:
    study = Study(env["MODEL"], env.get("ARGS", ""))
    plan = read_yaml(Path(f"recipes/{study.model}/margins.yaml"))
    return train_and_report(study, "margins", plan, [*range(plan["arm_seeds"])], env)


def read_choices(env: dict[str, str], swaps_labels: bool) -> tuple[list[str], list[int], list[float]]:
    """METHODS, SEEDS and NOISE (0 unless the setting `swaps_labels`). Raises ConfigError."""
    known = (*METHODS, *READINGS)
    methods = env.get("METHODS", "").replace(",", " ").split() or list(METHODS)
    if not {*methods} <= {*known}:
        raise ConfigError(f"METHODS={env['METHODS']!r}: expected some of {', '.join(known)}")
    seeds, noise = env.get("SEEDS") or "0,1,2", env.get("NOISE") or ("0,0.15" if swaps_labels else "0")
    noises = [float(share) for share in noise.split(",")]
    if any(noises) and not swaps_labels:  # runs "with noise" would be trained on clean labels
        raise ConfigError(f"NOISE={noise!r}: only the labels of the tiny world are swapped; leave it out")
    chosen = [name for name in known if name in methods or name == OURS]
    return chosen, [int(seed) for seed in seeds.split(",")], noises


def train_and_report(study: Study, name: str, plan: dict, seeds: list[int], env: dict[str, str]) -> int:
    """The study of `plan`, which has the keys of a margins.yaml, in outputs/<model>/<name>."""
    start = study.base.values["model_name_or_path"]
    if start.startswith("outputs/") and not (
        has_weights(Path(start)) and (recorded_run(start) or {}).get("finished", True)
    ):
        raise ConfigError(
            f"{start}, where all runs start, holds no finished model: run make train MODEL={study.model} first"
        )
    folder, metric, contrasts = Path(f"outputs/{study.model}/{name}"), study.task.selection_metric, name == "margins"
    searches, family = [], {}
    for arm, values in plan["arms"].items():
        rate = values["learning_rate"]
        searches += [Trial("search", arm, one, SEARCH_SEED, 0.0) for one in rate] if isinstance(rate, list) else []
        family |= dict.fromkeys(values["methods"], (arm, rate))
    draws = [(seed, noise) for noise in plan["noise"] for seed in seeds]
    grids, grid_seeds = plan.get("grids", {}), range(plan.get("grid_seeds", 0))
    for run in [Trial("report", method, None, 0, 0.0) for method in family] + grid_runs(study, grids, {}, grid_seeds):
        if "use_cpu" not in study.recipe(run).values:  # meant for several GPUs: it says nothing of a CPU
            raise ConfigError(f"MODEL={study.model}: too large to train in one process; see make sweep and make table")
    # On a GPU one run at a time, which needs all of it and is timed by the clock.
    workers = whole_number(env, "WORKERS", os.cpu_count() if study.base.values.get("use_cpu") else 1)
    with locked(folder, "MODEL"):
        log = Log(folder / "runs.jsonl", study, workers)
        # ------------------ Search, then train
        searched = log.train("rates", searches)
        best = best_runs(searched, metric)
        rates = {method: best[arm]["learning_rate"] if arm in best else rate for method, (arm, rate) in family.items()}
        tuned = log.train("objectives", grid_runs(study, plan.get("objectives", {}), rates, [SEARCH_SEED], "search"))
        own = {method: tuple(map(tuple, line["objective"])) for method, line in best_runs(tuned, metric).items()}
        # First the primary contrast, for a study that is stopped early.
        order = sorted(itertools.product(draws, family), key=lambda each: each[1] not in (OURS, PRIMARY))
        runs = [Trial("report", method, rates[method], *draw, own.get(method, ())) for draw, method in order]
        lines = log.train("arms", runs)
        # ------------------ Arms that need a result
        if contrasts:
            means = [mean_gamma_arm(line) for line in lines if line["method"] == OURS and "gamma_mean" in line]
            near = {method: rate for method, rate in nearest_rates(searched, rates).items() if rate != rates[method]}
            matched = [Trial("report", method, rate, *draw) for method, rate in near.items() for draw in draws]
            lines += [line | {"method": comparison.MEAN_GAMMA} for line in log.train("mean margins", means)]
            lines += [line | {"method": line["method"] + comparison.AT_KL} for line in log.train("distances", matched)]
        points = outcomes(log.train("grids", grid_runs(study, grids, rates, grid_seeds)), metric)
        # ------------------ Report
        primary, metrics = PRIMARY if contrasts else None, plan.get("metrics", [metric])
        rows = {metric: comparison.summarize(lines, metric, primary) for metric in metrics}
        text = comparison.report(rows, lines, searched + tuned, spread_table(points) if grids else "")
        files = comparison.write(folder, text, rows[metrics[0]], lines, metrics[0])
        if grids:
            files += save(draw_spread(points, comparison.METRICS[metric]), folder / "spread")
    print(text, *files, sep="\n")
    return 0


def best_runs(lines: list[dict], metric: str) -> dict[str, dict]:
    """Method -> the line with its highest `metric`, of equal ones that of the highest rate, then the first.

    Raises ConfigError if every run of some method diverged: such a run has no metrics.
    """

    def rank(line: dict) -> tuple[float, float]:
        return line["metrics"].get(metric, float("-inf")), line["learning_rate"]

    methods = {line["method"] for line in lines}
    best = {method: max((line for line in lines if line["method"] == method), key=rank) for method in methods}
    if lost := [method for method, line in best.items() if "diverged" in line["metrics"]]:
        raise ConfigError(f"every learning rate made {', '.join(lost)} diverge: add lower ones")
    return best


def mean_gamma_arm(line: dict) -> Trial:
    """SimPO with the mean margin that this run of RMiPO had."""
    own = (("beta", OBJECTIVES[OURS]().beta), ("gamma", round(line["gamma_mean"], 4)))
    return Trial("report", "simpo", line["learning_rate"], line["seed"], line["noise"], own)


def nearest_rates(searched: list[dict], rates: dict[str, float]) -> dict[str, float]:
    """Searched method -> the rate at which it ends nearest to RMiPO's distance from the initial model."""
    # A method can solve more tasks only because it was trained further: at like distances that is not the reason.
    measured = [line for line in searched if "kl_initial" in line["metrics"]]  # none where nothing is sampled
    kl = {(line["method"], line["learning_rate"]): line["metrics"]["kl_initial"] for line in measured}
    if (ours := kl.get((OURS, rates[OURS]))) is None:
        return {}
    return dict(sorted(kl, key=lambda key: -abs(kl[key] - ours)))  # of a method's rates the last one stays


def grid_runs(study: Study, grids: dict, rates: dict, seeds: Iterable[int], purpose="report") -> list[Trial]:
    """The settings of each method's grid, at its learning rate. In a search values of its own recipe count as none given."""
    runs = []
    for method, grid in grids.items():
        own = study.recipe(Trial(purpose, method, None, 0, 0.0)).values["objective"]
        for point in points_of(grid):
            changed = tuple((name, value) for name, value in point if purpose == "report" or own.get(name) != value)
            runs += [Trial(purpose, method, rates.get(method), seed, 0.0, changed) for seed in seeds]
    return runs


def points_of(grid: dict[str, list]) -> list[tuple[tuple[str, float], ...]]:
    """Every combination of a grid's values; a key that names several hyperparameters takes them together."""
    columns = []
    for names, values in grid.items():
        names = [name.strip() for name in names.split(",")]
        rows = [value if isinstance(value, list) else [value] for value in values]
        columns.append([tuple(zip(names, row, strict=True)) for row in rows])
    return [sum(choice, ()) for choice in itertools.product(*columns)]


def outcomes(lines: list[dict], metric: str) -> pd.Series:
    """(method, point of its grid) -> the metric's mean over the seeds; a run that diverged counts as 0."""
    rows = [(line["method"], str(line["objective"]), line["metrics"].get(metric, 0.0)) for line in lines]
    return (
        pd.DataFrame(rows, columns=["method", "point", metric]).groupby(["method", "point"], sort=False)[metric].mean()
    )


def spread_table(points: pd.Series) -> str:
    spread = points.groupby("method", sort=False).agg(["size", "max", "median", "min", "std"])
    rows = [[row.Index, str(row.size), *(f"{number:.3f}" for number in row[2:])] for row in spread.itertuples()]
    head = ["method", "points", "best", "median", "worst", "std"]
    return f"Spread over the grid, each point a mean over seeds:\n\n{markdown_table([head, *rows])}"


@house_style
def draw_spread(points: pd.Series, label: str) -> Figure:
    """A box per method over the settings of its grid."""
    methods = dict([*points.groupby("method", sort=False)])
    figure, (axis,) = panels(1, height=1.0 + 0.5 * len(methods))
    axis.boxplot(list(methods.values()), orientation="horizontal", tick_labels=list(map(method_label, methods)))
    axis.set_xlabel(label)
    return figure
