"""Figure 2: a metric over DPO's beta, SimPO's beta and SimPO's gamma, from every run below a model's folder."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.reporting.figures import GREY, footnotes, house_style, method_color, panel_letter, panels
from rmipo.reporting.provenance import figure_notes, require_comparable
from rmipo.reporting.results import ReportError, Result, Run, eval_command, find_runs, load_result


@dataclass(frozen=True)
class Measured:
    """A finished run with its value of the metric, and the evaluation that it was read from, if it was."""

    run: Run
    value: float
    error: float | None  # standard error of the evaluation
    result: Result | None


Lines = dict[str, dict[float, list[Measured]]]  # label -> value of the hyperparameter -> runs that repeat each other


@house_style
def figure2(outputs: Path, model: str, metric: str = "mt_bench", name: str = "") -> Figure:
    """`metric` over DPO's beta, SimPO's beta at gamma 1.0, and SimPO's gamma at beta 2.0; dashed: before training.

    Every finished run below outputs/<model> counts, whatever its folder is called: hyperparameters are read from
    run.json. A line joins runs that differ in one hyperparameter; of runs that differ in the seed alone it shows the
    mean, with a bar from the lowest to the highest; of single ones the standard error. Runs on other pairs than most
    are left out.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_common/acc_avg_logp, ...);
    `name` is the evaluations' EVAL_NAME.
    """
    runs = {method: measured(outputs, model, method, metric, name) for method in ("dpo", "simpo")}
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
    start = load_result(outputs, model, "initial", benchmark.name, name) if benchmark else None
    evaluations = [point.result for points in runs.values() for point in points if point.result] + [start] * bool(start)
    require_comparable("figure 2", evaluations)
    figure, axes = panels(len(panel_runs), sharey=True)
    kinds: set[str] = set()
    for axis, letter, (title, method, key, points) in zip(axes, "abc", panel_runs, strict=True):
        lines = lines_over(key, points)
        if not lines:
            raise ReportError(missing_message(outputs, model, method, key, metric, name))
        kinds |= draw_lines(axis, lines, method_color(method))
        if start is not None and metric in start.metrics:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(metric_label(metric))
    bars = [f"Bars: {', '.join(sorted(kinds))}."] if kinds else []
    footnotes(figure, [*bars, *figure_notes(evaluations)])
    return figure


def measured(outputs: Path, model: str, method: str, metric: str, name: str = "") -> list[Measured]:
    """The finished runs of `method` that have the metric, on the data that most of them were trained on."""
    found, benchmark = [], benchmark_of(metric)
    for run in find_runs(outputs, model):
        if run.objective.get("name") != method or not run.finished:
            continue
        if benchmark:
            folder = run.folder.relative_to(outputs / model).as_posix()
            result = load_result(outputs, model, folder, benchmark.name, name)
            value = None if result is None else result.metrics.get(metric)
            error = None if result is None else result.metrics.get(benchmark.metrics[metric].standard_error)
        else:
            result, error, value = None, None, next((row[metric] for row in reversed(run.log()) if metric in row), None)
        copied = any(run.record == other.run.record for other in found)  # a merged adapter has its run's record and log
        if value is not None and not copied:
            found.append(Measured(run, value, error, result))
    data = Counter(str(point.run.record.get("fingerprints")) for point in found)
    return [p for p in found if str(p.run.record.get("fingerprints")) == data.most_common(1)[0][0]]


def lines_over(key: str, points: list[Measured]) -> Lines:
    """A line for each combination of everything but `key`, with two values of it or more.

    Labels say what distinguishes the lines, learning rates first.
    """
    lines: dict[str, dict[float, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        fixed = point.run.experiment()
        fixed["objective"] = {name: value for name, value in point.run.objective.items() if name != key}
        lines[json.dumps(fixed, sort_keys=True)][point.run.objective[key]].append(point)
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


def draw_lines(axis: Axes, lines: Lines, color: str) -> set[str]:
    """Draws the means, and a bar where repetitions or a standard error give one; returns what the bars are."""
    xs = sorted({x for line in lines.values() for x in line})  # evenly spaced: the grids fit no one scale
    shades = np.linspace(0.4, 1, len(lines)) if len(lines) > 1 else [1]
    kinds = set()
    for (label, line), marker, shade in zip(lines.items(), "osD^v<>" * len(lines), shades, strict=False):
        style = {"color": color, "alpha": shade}
        means = [np.mean([point.value for point in points]) for points in line.values()]
        axis.plot([xs.index(x) for x in line], means, marker=marker, markersize=4.5, label=label, **style)
        for x, points in line.items():
            if bar := bar_of(points):
                low, high, kind = bar
                axis.vlines(xs.index(x), low, high, linewidth=1, **style)
                kinds.add(kind)
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)
    return kinds


def bar_of(points: list[Measured]) -> tuple[float, float, str] | None:
    """Lower end, upper end and meaning of a point's bar; None for a single run without a standard error."""
    values = [point.value for point in points]
    if len(points) > 1:
        seeds = {point.run.seed for point in points}
        return min(values), max(values), f"lowest and highest of several {'seeds' if len(seeds) > 1 else 'runs'}"
    error = points[0].error
    return None if error is None else (values[0] - error, values[0] + error, "± 1 standard error of the evaluation")


def missing_message(outputs: Path, model: str, method: str, key: str, metric: str, name: str) -> str:
    runs = [run for run in find_runs(outputs, model) if run.objective.get("name") == method]
    finished = sum(run.finished for run in runs)
    steps = f"run `make sweep MODEL={model} METHOD={method}`"
    if benchmark := benchmark_of(metric):
        steps += f", then `{eval_command(model, f'sweep-{method}/<point>', benchmark.name, name)}` for each point"
    else:
        known = ", ".join(name for bench in BENCHMARKS.values() for name in bench.metrics)
        steps += f", or name another METRIC: a key of their metrics.jsonl or one of {known}"
    return (
        f"figure 2 needs two or more finished {method} runs of {model} that differ in {key} alone and have {metric}; "
        f"below {outputs / model} are {len(runs)} of {method}, {finished} of them finished: {steps}"
    )
