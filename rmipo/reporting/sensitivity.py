"""Figure 2: a metric over DPO's beta, SimPO's beta and SimPO's gamma, from every run below a model's folder."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.reporting.figures import GREY, house_style, method_color, panel_letter, panels
from rmipo.reporting.provenance import require_comparable
from rmipo.reporting.results import ReportError, Result, Run, eval_command, find_runs, load_result
from rmipo.run.identity import WITHOUT_EFFECT

# Recipe keys that make no other point of it: runs that differ in these alone are repetitions.
REPEATED = {"seed", "output_dir", "logging_steps", "save_steps"} | {
    key.removeprefix("recipe.") for key in WITHOUT_EFFECT
}
Lines = dict[str, dict[float, list[float]]]  # label -> value of the hyperparameter -> metric of each run


@dataclass(frozen=True)
class Measured:
    """A finished run with its value of the metric, and the evaluation that it was read from, if it was."""

    run: Run
    value: float
    result: Result | None


@house_style
def figure2(outputs: Path, model: str, metric: str = "mt_bench") -> Figure:
    """`metric` over DPO's beta, SimPO's beta at gamma 1.0, and SimPO's gamma at beta 2.0; dashed: before training.

    Every finished run below outputs/<model> counts, whatever its folder is called: hyperparameters are read from
    run.json. A line joins runs that differ in one hyperparameter; of runs that differ in the seed alone it shows the
    mean, with a bar from the lowest to the highest. Runs on other pairs than most are left out.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_common/acc_avg_logp, ...).
    """
    runs = {method: measured(outputs, model, method, metric) for method in ("dpo", "simpo")}
    panel_runs = [
        ("DPO, varying $\\beta$", "dpo", "beta", runs["dpo"]),
        (
            "SimPO, varying $\\beta$ ($\\gamma=1.0$)",
            "simpo",
            "beta",
            [point for point in runs["simpo"] if point.run.objective["gamma"] == 1.0],
        ),
        (
            "SimPO, varying $\\gamma$ ($\\beta=2.0$)",
            "simpo",
            "gamma",
            [point for point in runs["simpo"] if point.run.objective["beta"] == 2.0],
        ),
    ]
    benchmark = benchmark_of(metric)
    start = load_result(outputs, model, "initial", benchmark.name) if benchmark else None
    evaluations = [point.result for points in runs.values() for point in points if point.result] + [start] * bool(start)
    require_comparable("figure 2", evaluations)
    figure, axes = panels(len(panel_runs), sharey=True)
    repeated = False
    for axis, letter, (title, method, key, points) in zip(axes, "abc", panel_runs, strict=True):
        lines = lines_over(key, points)
        if not lines:
            raise ReportError(missing_message(outputs, model, method, key, metric))
        draw_lines(axis, lines, method_color(method))
        repeated |= any(len(values) > 1 for line in lines.values() for values in line.values())
        if start is not None and metric in start.metrics:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(metric_label(metric))
    if repeated:
        figure.supxlabel("Bars: lowest and highest of several seeds", fontsize=7)
    return figure


def measured(outputs: Path, model: str, method: str, metric: str) -> list[Measured]:
    """The finished runs of `method` that have the metric, on the data that most of them were trained on."""
    found, benchmark = [], benchmark_of(metric)
    for run in find_runs(outputs, model):
        if run.objective.get("name") != method or not run.finished:
            continue
        if benchmark:
            folder = run.folder.relative_to(outputs / model).as_posix()
            result = load_result(outputs, model, folder, benchmark.name)
            value = None if result is None else result.metrics.get(metric)
        else:
            result, value = None, next((row[metric] for row in reversed(run.log()) if metric in row), None)
        copied = any(run.record == other.run.record for other in found)  # a merged adapter has its run's record and log
        if value is not None and not copied:
            found.append(Measured(run, value, result))
    data = Counter(str(point.run.record.get("fingerprints")) for point in found)
    return [p for p in found if str(p.run.record.get("fingerprints")) == data.most_common(1)[0][0]]


def lines_over(key: str, points: list[Measured]) -> Lines:
    """A line for each combination of everything but `key`, with two values of it or more.

    Labels say what distinguishes the lines, learning rates first.
    """
    lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        fixed = {name: value for name, value in point.run.record["recipe"].items() if name not in REPEATED}
        fixed["objective"] = {name: value for name, value in point.run.objective.items() if name != key}
        lines[json.dumps(fixed, sort_keys=True)][point.run.objective[key]].append(point.value)
    drawn = {fixed: dict(sorted(line.items())) for fixed, line in lines.items() if len(line) > 1}
    settings = [json.loads(fixed) for fixed in drawn]
    names = dict.fromkeys(["learning_rate", *(name for fixed in settings for name in fixed)])
    varying = [name for name in names if len({str(fixed.get(name)) for fixed in settings}) > 1]
    labels = [
        ", ".join(f"{'lr' if name == 'learning_rate' else name} {fixed.get(name, 'default')}" for name in varying)
        for fixed in settings
    ]
    order = sorted(range(len(labels)), key=lambda i: (settings[i]["learning_rate"], labels[i]))
    lines_drawn = list(drawn.values())
    return {labels[i]: lines_drawn[i] for i in order}


def draw_lines(axis: Axes, lines: Lines, color: str) -> None:
    xs = sorted({x for line in lines.values() for x in line})  # evenly spaced: the grids fit no one scale
    shades = np.linspace(0.4, 1, len(lines)) if len(lines) > 1 else [1]
    for (label, line), marker, shade in zip(lines.items(), "osD^v<>" * len(lines), shades, strict=False):
        positions, values = [xs.index(x) for x in line], list(line.values())
        style = {"color": color, "alpha": shade}
        axis.plot(positions, [np.mean(v) for v in values], marker=marker, markersize=4.5, label=label, **style)
        axis.vlines(positions, [min(v) for v in values], [max(v) for v in values], linewidth=1, **style)
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)


def missing_message(outputs: Path, model: str, method: str, key: str, metric: str) -> str:
    runs = [run for run in find_runs(outputs, model) if run.objective.get("name") == method]
    finished = sum(run.finished for run in runs)
    steps = f"run `make sweep MODEL={model} METHOD={method}`"
    if benchmark := benchmark_of(metric):
        steps += f", then `{eval_command(model, f'sweep-{method}/<point>', benchmark.name)}` for each point"
    else:
        known = ", ".join(name for bench in BENCHMARKS.values() for name in bench.metrics)
        steps += f", or name another METRIC: a key of their metrics.jsonl or one of {known}"
    return (
        f"figure 2 needs two or more finished {method} runs of {model} that differ in {key} alone and have {metric}; "
        f"below {outputs / model} are {len(runs)} of {method}, {finished} of them finished: {steps}"
    )
