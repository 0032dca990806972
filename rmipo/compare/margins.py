"""The program of `make margins`: is it the pair's own margin that helps, and how much do outcomes depend on tuning?

The arms answer the first question: RMiPO, RMiPO whose margins are dealt to other pairs ("shuffled"), and SimPO at the mean of
RMiPO's margins. They share the learning rate at which RMiPO is best in a search; methods without margins have searches of their
own, and are trained once more at the rate that ends nearest to RMiPO's distance from the initial model, if that is another one.
The grids answer the second: as many settings of each method, same budget.
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
from rmipo.compare.trial import SEARCH_SEED, Trial
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
    folder, metric = Path(f"outputs/{model}/margins"), study.task.selection_metric
    workers = whole_number(env, "WORKERS", study.workers)
    arms, tried = plan["arms"], plan.get("objectives", {})
    family = {method: name for name, arm in arms.items() for method in arm["methods"]}
    searches = [
        run
        for name, arm in arms.items()
        if isinstance(arm["learning_rate"], list)
        for run in search_runs([name], arm["learning_rate"])
    ]
    draws = [(seed, noise) for noise in plan["noise"] for seed in range(plan["arm_seeds"])]
    for run in [Trial("report", method, None, 0, 0.0) for method in family] + grid_runs(plan, {}):
        study.check(run)
    with locked(folder, "MODEL"):
        log = Log(folder / "runs.jsonl", study)
        total = len(searches) + sum(len(points(grid)) for grid in tried.values()) + len(grid_runs(plan, {}))
        with tqdm(total=total + (len(family) + 1) * len(draws), unit="run", smoothing=0) as bar:

            def finish(runs: list[Trial]) -> list[tuple[Trial, dict]]:
                return list(zip(runs, execute_all(log, runs, workers, bar), strict=True))

            ###########################
            # Search, then train
            ###########################
            searched = finish(searches)
            best = best_rates([line for _, line in searched], metric)
            rates = {method: best.get(name, arms[name]["learning_rate"]) for method, name in family.items()}
            tuned = finish(objective_runs(study, tried, rates))
            own = best_objectives(tuned, metric)
            runs = [Trial("report", name, rates[name], *draw, own.get(name, ())) for draw in draws for name in family]
            # A study that is stopped early has its primary contrast.
            runs.sort(key=lambda run: run.method not in PRIMARY)
            done = finish(runs)
            ###########################
            # Arms that need a result
            ###########################
            named = [(run.method, line) for run, line in done]
            means = [mean_gamma_arm(run, line) for run, line in done if run.method == OURS and "gamma_mean" in line]
            named += [(comparison.MEAN_GAMMA, line) for _, line in finish(means)]
            near = {name: rate for name, rate in nearest_rates(searched, rates).items() if rate != rates[name]}
            matched = [Trial("report", name, rate, *draw) for name, rate in near.items() for draw in draws]
            bar.total += len(matched)
            named += [(run.method + comparison.AT_KL, line) for run, line in finish(matched)]
            spread = finish(grid_runs(plan, rates))
        text = report(named, spread, [line for _, line in searched + tuned], plan.get("metrics", [metric]))
        print(text)
        (folder / "report.md").write_text(text)
        if spread:
            draw_spread(outcomes(spread, metric), comparison.METRICS[metric]).savefig(folder / "spread.png")
            print(folder / "spread.png")
    return 0


def objective_runs(study: Study, tried: dict[str, dict], rates: dict[str, float]) -> list[Trial]:
    """The search of hyperparameters, each method at its learning rate. Values of its own recipe count as none given."""
    runs = []
    for method, grid in tried.items():
        own = study.recipe(Trial("search", method, None, SEARCH_SEED, 0.0)).values["objective"]
        for point in points(grid):
            changed = tuple((name, value) for name, value in point if own.get(name) != value)
            runs.append(Trial("search", method, rates[method], SEARCH_SEED, 0.0, changed))
    return runs


def best_objectives(tuned: list[tuple[Trial, dict]], metric: str) -> dict[str, tuple]:
    """Method -> the hyperparameters of its run with the highest `metric`, of equal ones the first."""
    best: dict[str, Trial] = {}
    for run, _ in sorted(tuned, key=lambda pair: -pair[1]["metrics"].get(metric, float("-inf"))):
        best.setdefault(run.method, run)
    return {method: run.objective for method, run in best.items()}


def nearest_rates(searched: list[tuple[Trial, dict]], rates: dict[str, float]) -> dict[str, float]:
    """Searched method -> the rate at which it ends nearest to RMiPO's distance from the initial model."""
    # A method can solve more tasks only because it was trained further: at like distances that is not the reason.
    kl = {(run.method, run.learning_rate): line["metrics"].get("kl_initial", float("nan")) for run, line in searched}
    ours = kl.get((OURS, rates[OURS]), float("nan"))  # not measured where nothing is sampled, as on tiny
    gap = {key: abs(value - ours) for key, value in kl.items()}
    near: dict[str, float] = {}
    for method, rate in sorted((key for key in gap if gap[key] >= 0), key=gap.get):
        near.setdefault(method, rate)
    return near


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
    arms: list[tuple[str, dict]], grids: list[tuple[Trial, dict]], searched: list[dict], metrics: list[str]
) -> str:
    """Markdown: per metric the arms of each label noise; the spread over the grids and the search by the first metric."""
    lines = [line | {"method": name} for name, line in arms]
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
