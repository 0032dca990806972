"""Figure 2: a metric over DPO's beta, SimPO's beta and SimPO's gamma, from every run below a model's folder."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo.evaluation import benchmark_of, metric_label
from rmipo.fingerprints import json_fingerprint
from rmipo.plots import GREY, house_style, method_color, panel_letter, panels
from rmipo.reporting.figures import footnotes
from rmipo.reporting.provenance import figure_notes, require_comparable
from rmipo.reporting.results import ReportError, Result, TrainingRun, eval_command, find_runs, load_result


class Measured(NamedTuple):
    """A finished run with its value of the metric, and the evaluation that it was read from, if it was."""

    run: TrainingRun
    value: float
    error: float | None  # standard error of the evaluation
    result: Result | None


Lines = dict[str, dict[float, list[Measured]]]  # label -> value of the hyperparameter -> runs that repeat each other


@house_style
def figure2(outputs: Path, model: str, metric: str = "mt_bench", name: str = "") -> Figure:
    """`metric` over DPO's beta, SimPO's beta at gamma 1.0, and SimPO's gamma at beta 2.0; dashed: before training.

    A line joins runs that differ in one hyperparameter; of runs that differ in the seed alone it shows the mean, with a
    bar from the lowest to the highest; of single ones the standard error.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_common/acc_avg_logp, ...);
    `name` is the evaluations' EVAL_NAME.
    """
    dpo, simpo = (measured(outputs, model, method, metric, name) for method in ("dpo", "simpo"))
    panel_runs = [  # the paper varies one at a time, the other at its default
        ("DPO, varying $\\beta$", "dpo", "beta", dpo),
        (
            "SimPO, varying $\\beta$ ($\\gamma=1.0$)",
            "simpo",
            "beta",
            [p for p in simpo if p.run.objective["gamma"] == 1.0],
        ),
        (
            "SimPO, varying $\\gamma$ ($\\beta=2.0$)",
            "simpo",
            "gamma",
            [p for p in simpo if p.run.objective["beta"] == 2.0],
        ),
    ]
    benchmark = benchmark_of(metric)
    start = load_result(outputs, model, "initial", benchmark.name, name) if benchmark else None
    evaluations = [point.result for point in (*dpo, *simpo) if point.result] + [start] * bool(start)
    # The judge must not change along a line, nor between a line and its start.
    require_comparable("figure 2", evaluations)
    figure, axes = panels(len(panel_runs), sharey=True)
    for axis, letter, (title, method, key, points) in zip(axes, "abc", panel_runs, strict=True):
        lines = lines_over(key, points)
        if not lines:
            remedy = f"`make sweep MODEL={model} METHOD={method}`"
            if benchmark:
                remedy += f", then `{eval_command(model, f'sweep-{method}/<point>', benchmark.name, name)}` for each"
            raise ReportError(f"figure 2 needs {method} runs with {metric} that differ in {key} alone: run {remedy}")
        draw_lines(axis, lines, method_color(method))
        if start is not None and metric in start.metrics:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(metric_label(metric))
    bars = "Bars: lowest and highest of several runs, of a single one ± 1 standard error of the evaluation."
    footnotes(figure, [bars, *figure_notes(evaluations)])
    return figure


def measured(outputs: Path, model: str, method: str, metric: str, name: str = "") -> list[Measured]:
    """The finished runs of `method` that have the metric, on the data that most of them were trained on."""
    found, benchmark = [], benchmark_of(metric)
    # Whatever a folder is called, the hyperparameters are those in its run.json.
    for run in find_runs(outputs, model):
        copied = any(run.record == other.run.record for other in found)  # a merged adapter has its run's record
        if run.objective.get("name") != method or not run.finished or copied:
            continue
        if benchmark is None:
            values = [row[metric] for row in run.log() if metric in row]
            found += [Measured(run, value, None, None) for value in values[-1:]]
        else:
            result = load_result(
                outputs, model, run.folder.relative_to(outputs / model).as_posix(), benchmark.name, name
            )
            if result is not None and metric in result.metrics:
                error = result.metrics.get(f"{metric}_standard_error")
                found.append(Measured(run, result.metrics[metric], error, result))
    # A sweep on other pairs, perhaps a trial on few, would move a line for another reason than its hyperparameter.
    data = Counter(str(point.run.record.get("fingerprints")) for point in found)
    return [p for p in found if str(p.run.record.get("fingerprints")) == data.most_common(1)[0][0]]


def lines_over(key: str, points: list[Measured]) -> Lines:
    """A line for each combination of everything but `key`, with two values of it or more. Labels say in what they differ."""
    lines: dict[str, dict[float, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    settings: dict[str, dict] = {}
    for point in points:
        fixed = point.run.experiment()
        fixed["objective"] = {name: value for name, value in point.run.objective.items() if name != key}
        line = json_fingerprint(fixed)
        settings[line] = fixed
        lines[line][point.run.objective[key]].append(point)
    # One value alone is no line, and says nothing of the hyperparameter.
    drawn = {line: dict(sorted(values.items())) for line, values in lines.items() if len(values) > 1}
    names = dict.fromkeys(["learning_rate", *(name for line in drawn for name in settings[line])])
    varying = [name for name in names if len({str(settings[line].get(name)) for line in drawn}) > 1]
    labels = {line: ", ".join(f"{name} {settings[line].get(name, 'default')}" for name in varying) for line in drawn}
    ordered = sorted(drawn, key=lambda line: (settings[line]["learning_rate"], labels[line]))
    return {labels[line]: drawn[line] for line in ordered}


def draw_lines(axis: Axes, lines: Lines, color: str) -> None:
    """The means, and a bar where repetitions or a standard error give one."""
    xs = sorted({x for line in lines.values() for x in line})  # evenly spaced: the grids fit no one scale
    shades = np.linspace(0.4, 1, len(lines)) if len(lines) > 1 else [1]
    for (label, line), marker, shade in zip(lines.items(), "osD^v<>" * len(lines), shades, strict=False):
        style = {"color": color, "alpha": shade}
        means = [np.mean([point.value for point in points]) for points in line.values()]
        axis.plot([xs.index(x) for x in line], means, marker=marker, markersize=4.5, label=label, **style)
        for x, points in line.items():
            values, error = [point.value for point in points], points[0].error or 0.0
            ends = (min(values), max(values)) if len(points) > 1 else (values[0] - error, values[0] + error)
            if ends[0] < ends[1]:
                axis.vlines(xs.index(x), *ends, linewidth=1, **style)
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)
