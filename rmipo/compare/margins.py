"""The program of `make margins`: is it the pair's own margin that helps, and how much do outcomes depend on tuning?

The arms answer the first question: RMiPO, RMiPO whose margins are dealt to other pairs ("shuffled"), and SimPO at the mean of
RMiPO's margins. They share the learning rate at which RMiPO is best in a search; methods without margins have searches of their
own. The grids answer the second: as many settings of each method, same budget.
"""

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from rmipo.compare.log import Log, best_rates, execute_all, search_runs
from rmipo.compare.study import Study
from rmipo.compare.trial import Trial
from rmipo.files import locked
from rmipo.launch.choices import choose_stages, whole_number
from rmipo.objectives import OBJECTIVES
from rmipo.plots import house_style, method_color, panels
from rmipo.recipe.files import read_yaml
from rmipo.reporting import comparison
from rmipo.reporting.render import markdown_table
from rmipo.reporting.results import OURS, method_label

PRIMARY = ("rmipo", "shuffled")  # the contrast that was named beforehand


def margins(env: dict[str, str]) -> int:
    model, _ = choose_stages({**env, "STAGE": ""})
    plan = read_yaml(Path(f"recipes/{model}/margins.yaml"))
    study = Study(model, env.get("ARGS", ""))
    folder, metric, rates = Path(f"outputs/{model}/margins"), study.task.selection_metric, {}
    workers = whole_number(env, "WORKERS", study.workers)
    searches = {
        name: search_runs([name], arms["learning_rate"])
        for name, arms in plan["arms"].items()
        if isinstance(arms["learning_rate"], list)
    }
    draws = [(seed, noise) for noise in plan["noise"] for seed in range(plan["arm_seeds"])]
    methods = [method for arms in plan["arms"].values() for method in arms["methods"]]
    for run in [Trial("report", method, None, 0, 0.0) for method in methods] + grid_runs(plan, rates):
        study.check(run)
    with locked(folder, "MODEL"):
        log = Log(folder / "runs.jsonl", study)
        total = sum(map(len, searches.values())) + (len(methods) + 1) * len(draws) + len(grid_runs(plan, rates))
        with tqdm(total=total, unit="run", smoothing=0) as bar:
            done: list[tuple[Trial, dict]] = []
            searched: list[dict] = []
            for name, arms in plan["arms"].items():
                rate = arms["learning_rate"]
                if name in searches:
                    found = execute_all(log, searches[name], workers, bar)
                    searched, rate = searched + found, best_rates(found, metric)[name]
                rates |= dict.fromkeys(arms["methods"], rate)
                runs = [Trial("report", method, rate, *draw) for draw in draws for method in arms["methods"]]
                # A study that is stopped early has its primary contrast.
                runs.sort(key=lambda run: run.method not in PRIMARY)
                done += zip(runs, execute_all(log, runs, workers, bar), strict=True)
            means = [mean_gamma_arm(run, line) for run, line in done if run.method == OURS and "gamma_mean" in line]
            done += zip(means, execute_all(log, means, workers, bar), strict=True)
            grids = grid_runs(plan, rates)
            spread = list(zip(grids, execute_all(log, grids, workers, bar), strict=True))
        text = report(done, spread, searched, plan.get("metrics", [metric]))
        print(text)
        (folder / "report.md").write_text(text)
        if spread:
            draw_spread(outcomes(spread, metric), comparison.METRICS[metric]).savefig(folder / "spread.png")
            print(folder / "spread.png")
    return 0


def grid_runs(plan: dict, rates: dict[str, float]) -> list[Trial]:
    return [
        Trial("report", method, rates.get(method), seed, 0.0, point)
        for seed in range(plan.get("grid_seeds", 0))
        for method, grid in plan.get("grids", {}).items()
        for point in points(grid)
    ]


def points(grid: dict[str, list]) -> list[tuple[tuple[str, float], ...]]:
    """Every combination of a grid's values; a key that names several hyperparameters takes them together."""
    columns = []
    for names, values in grid.items():
        names = [name.strip() for name in names.split(",")]
        rows = [value if isinstance(value, list) else [value] for value in values]
        columns.append([tuple(zip(names, row, strict=True)) for row in rows])
    return [sum(choice, ()) for choice in itertools.product(*columns)]


def mean_gamma_arm(run: Trial, line: dict) -> Trial:
    """SimPO with the mean margin that this run of RMiPO had."""
    own = (("beta", OBJECTIVES["rmipo"]().beta), ("gamma", round(line["gamma_mean"], 4)))
    return Trial("report", "simpo", run.learning_rate, run.seed, run.noise, own)


def outcomes(lines: list[tuple[Trial, dict]], metric: str) -> dict[str, list[float]]:
    """Method -> the metric's mean over the seeds for each point of its grid; a point with a run that diverged counts as 0."""
    values: dict = defaultdict(lambda: defaultdict(list))
    for run, line in lines:
        values[run.method][run.objective].append(line["metrics"].get(metric, 0.0))
    return {method: [mean(seeds) for seeds in grid.values()] for method, grid in values.items()}


def report(
    arms: list[tuple[Trial, dict]], grids: list[tuple[Trial, dict]], searched: list[dict], metrics: list[str]
) -> str:
    """Markdown: per metric the arms of each label noise; the spread over the grids and the search by the first metric."""
    lines = [line | {"method": comparison.MEAN_GAMMA} if run.objective else line for run, line in arms]
    parts = []
    for metric in metrics:
        parts += comparison.tables(comparison.summarize(lines, metric, primary=PRIMARY[1]), [], metric)
    if grids:
        rows = [["method", "points", "best", "median", "worst", "std"]]
        for method, values in outcomes(grids, metrics[0]).items():
            numbers = (max(values), median(values), min(values), stdev(values) if len(values) > 1 else 0.0)
            rows.append([method, str(len(values)), *(f"{number:.3f}" for number in numbers)])
        parts += ["Spread over the grid, each point a mean over seeds:", markdown_table(rows)]
    if searched:  # rewards at like distances from the initial model can be read off it
        for metric in (metrics[0], comparison.beside(metrics[0])):
            parts += [f"Search, {comparison.METRICS[metric]}:", comparison.search_table(searched, metric)]
    return "\n\n".join([*parts, comparison.UNITS, comparison.made_with(lines)]) + "\n"


@house_style
def draw_spread(outcomes: dict[str, list[float]], label: str) -> Figure:
    """One strip per method: each point a setting of its grid, the bar their median."""
    figure, (axis,) = panels(1, height=1.0 + 0.5 * len(outcomes))
    for row, (method, values) in enumerate(outcomes.items()):
        offsets = np.linspace(-0.18, 0.18, len(values))  # so that equal outcomes stay visible
        axis.scatter(np.sort(values), row + offsets, color=method_color(method), s=14, alpha=0.8)
        axis.vlines(np.median(values), row - 0.3, row + 0.3, color=method_color(method), linewidth=1.5)
    axis.set_yticks(range(len(outcomes)), [f"{method_label(name)}\n{len(v)} settings" for name, v in outcomes.items()])
    axis.set_ylim(len(outcomes) - 0.5, -0.5)
    axis.set_xlabel(label)
    return figure
