"""The program of `make margins`: is it the pair's own margin that helps, and how much do outcomes depend on tuning?

The arms answer the first question: RMiPO, RMiPO whose margins are dealt to other pairs ("shuffled"), and SimPO at the mean of
RMiPO's margins, all at one learning rate. The grids answer the second: as many settings of each method, same budget.
"""

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

from tqdm import tqdm

from rmipo.compare.log import Log, execute_all
from rmipo.compare.study import Study
from rmipo.compare.trial import Trial
from rmipo.evaluation.statistics import holm
from rmipo.launch.choices import choose_stages, positive_number
from rmipo.objectives import OBJECTIVES
from rmipo.recipe.files import read_yaml
from rmipo.record import environment
from rmipo.reporting.comparison import BESIDE, METRICS
from rmipo.reporting.spread import contrast, draw_spread
from rmipo.run.lock import locked

MEAN_GAMMA = "simpo-mean-gamma"
FIRST, SECOND = "rmipo", "shuffled"  # the primary contrast
NOTES = """\
± is the standard deviation over seeds. Brackets: 95% bootstrap interval over seeds and prompts, paired. p: sign flips of whole
seeds, Holm-corrected but for shuffled, the contrast named beforehand. "Could see": the difference that four of five studies of
this size would find. Every run of a noise level has the same pairs, order and learning rate."""


def margins(env: dict[str, str]) -> int:
    model, _ = choose_stages({**env, "STAGE": ""})
    plan = read_yaml(Path(f"recipes/{model}/margins.yaml"))
    study = Study(model, arguments=env.get("ARGS", ""))
    folder = Path(f"outputs/{model}/margins")
    rates, workers = plan["arms"], int(positive_number(env, "WORKERS", study.workers))
    arms = [
        Trial("report", method, rate, seed, noise)
        for noise in plan["noise"]
        for seed in range(plan["arm_seeds"])
        for method, rate in rates.items()
    ]
    arms.sort(
        key=lambda run: run.method not in (FIRST, SECOND)
    )  # a study that is stopped early has its primary contrast
    grids = [
        Trial("report", method, rates[method], seed, 0.0, point)
        for seed in range(plan.get("grid_seeds", 0))
        for method, grid in plan.get("grids", {}).items()
        for point in points(grid)
    ]
    for run in (*arms, *grids):
        study.check(run)
    with locked(folder, "MODEL"):
        log, facts = Log(folder / "runs.jsonl", study), environment()
        with tqdm(
            total=len(arms) + len(grids) + plan["arm_seeds"] * len(plan["noise"]), unit="run", smoothing=0
        ) as bar:

            def finished(runs: list[Trial]) -> list[tuple[Trial, dict]]:
                lines = {}
                for run, line in execute_all(log, runs, workers, facts):
                    bar.update()
                    bar.set_postfix_str(str(run))
                    lines[run] = line
                return list(lines.items())

            done = finished(arms)
            done += finished(
                [mean_gamma_arm(run, line) for run, line in done if run.method == FIRST and "gamma_mean" in line]
            )
            spread = finished(grids)
    metric = study.task.selection_metric
    text = "\n".join(report(done, spread, name) for name in plan.get("metrics", [metric]))
    print(text)
    (folder / "report.md").write_text(text)
    if spread:
        draw_spread(outcomes(spread, metric), METRICS[metric]).savefig(folder / "spread.png")
        print(folder / "spread.png")
    return 0


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


def report(arms: list[tuple[Trial, dict]], grids: list[tuple[Trial, dict]], metric: str) -> str:
    """The arms per label noise, the primary contrast first, then the spread over the grids; Markdown."""
    tables: dict = defaultdict(lambda: defaultdict(dict))
    beside = BESIDE.get(metric, "constraints_cut")
    for run, line in arms:
        tables[run.noise][MEAN_GAMMA if run.objective else run.method][run.seed] = line
    text = []
    for noise, methods in tables.items():
        contrasts = {
            name: contrast(scores(methods[FIRST], metric), scores(lines, metric))
            for name, lines in methods.items()
            if name != FIRST
        }
        secondary = [name for name in contrasts if name != SECOND]
        adjusted = dict(zip(secondary, holm([contrasts[name].p for name in secondary]), strict=True))
        adjusted[SECOND] = contrasts[SECOND].p  # named beforehand: the one contrast that needs no correction
        text += [f"Label noise {noise:.0%}, {len(methods[FIRST])} seeds:", ""]
        text += [
            f"| arm | {metric} | {FIRST} minus arm [95%] | p | could see | mean gamma | {beside} |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, lines in methods.items():
            values = [line["metrics"].get(metric, 0.0) for line in lines.values()]
            gammas = [line["gamma_mean"] for line in lines.values() if "gamma_mean" in line]
            others = [line["metrics"][beside] for line in lines.values() if beside in line["metrics"]]
            row = [name, f"{mean(values):.3f} ± {deviation(values):.3f}", "", "", ""]
            if name in contrasts:
                result = contrasts[name]
                row[2:] = f"{result.mean:+.3f} [{result.low:+.3f}, {result.high:+.3f}]", f"{adjusted[name]:.3f}"
                row += [f"{result.detectable:.3f}"]
            row += [f"{mean(numbers):.2f}" if numbers else "" for numbers in (gammas, others)]
            text.append(f"| {' | '.join(row)} |")
        text.append("")
    if grids:
        text += ["Spread over the grid, each point a mean over seeds:", ""]
        text += ["| method | points | best | median | worst | std |", "|---|---:|---:|---:|---:|---:|"]
    for method, values in outcomes(grids, metric).items():
        best, middle, worst = max(values), median(values), min(values)
        text.append(f"| {method} | {len(values)} | {best:.3f} | {middle:.3f} | {worst:.3f} | {deviation(values):.3f} |")
    text += ["", NOTES]
    return "\n".join(text) + "\n"


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def scores(lines: dict[int, dict], metric: str) -> list[list[float]]:
    """(seeds, prompts) of an arm; one column where the metric isn't known per prompt. A run that diverged scores 0."""
    by_seed = [line["metrics"] for _, line in sorted(lines.items())]
    if all(metric in metrics.get("per_prompt", {}) for metrics in by_seed):
        return [metrics["per_prompt"][metric] for metrics in by_seed]
    return [[metrics.get(metric, 0.0)] for metrics in by_seed]
