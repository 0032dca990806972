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

LABELS = {"learning_rate": "lr", "max_steps": "steps", "num_train_epochs": "epochs"}
LOGGED = {  # what an axis calls a logged metric; others are called by their key without its prefix
    "acc_avg_logp": "Pairs ranked right",
    "margin_avg_logp": "Margin (nats per token)",
    "chosen_avg_logp": "log p of chosen (nats per token)",
    "gamma_mean": "Mean gamma",
    "loss": "Loss",
}


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

    Every finished run below outputs/<model> counts, whatever its folder is called: hyperparameters are read from
    run.json. A line joins runs that differ in one hyperparameter; of runs that differ in the seed alone it shows the
    mean, with a bar from the lowest to the highest; of single ones the standard error. Runs on other pairs than most
    are left out.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_common/acc_avg_logp, ...);
    `name` is the evaluations' EVAL_NAME.
    """
    runs = {method: measured(outputs, model, method, metric, name) for method in ("dpo", "simpo")}
    # The paper varies one at a time, the other at its default.
    at_gamma = [point for point in runs["simpo"] if point.run.objective["gamma"] == 1.0]
    at_beta = [point for point in runs["simpo"] if point.run.objective["beta"] == 2.0]
    panel_runs = [
        ("DPO, varying $\\beta$", "dpo", "beta", runs["dpo"]),
        ("SimPO, varying $\\beta$ ($\\gamma=1.0$)", "simpo", "beta", at_gamma),
        ("SimPO, varying $\\gamma$ ($\\beta=2.0$)", "simpo", "gamma", at_beta),
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
            remedy = f"`make sweep MODEL={model} METHOD={method}`"
            if benchmark:
                remedy += (
                    f", then `{eval_command(model, f'sweep-{method}/<point>', benchmark.name, name)}` for each point"
                )
            raise ReportError(
                f"figure 2 needs {method} runs of {model} with {metric} that differ in {key} alone: run {remedy}"
            )
        kinds |= draw_lines(axis, lines, method_color(method))
        if start is not None and metric in start.metrics:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(axis_label(metric))
    bars = [f"Bars: {', '.join(sorted(kinds))}."] if kinds else []
    footnotes(figure, [*bars, *figure_notes(evaluations)])
    return figure


def axis_label(metric: str) -> str:
    if benchmark_of(metric):
        return metric_label(metric)
    key = metric.rpartition("/")[2].removeprefix("eval_")
    return LOGGED.get(key, key.replace("_", " ")) + (", held out" if metric.startswith("eval_") else "")


def measured(outputs: Path, model: str, method: str, metric: str, name: str = "") -> list[Measured]:
    """The finished runs of `method` that have the metric, on the data that most of them were trained on."""
    found, benchmark = [], benchmark_of(metric)
    for run in find_runs(outputs, model):
        if run.objective.get("name") != method or not run.finished:
            continue
        result, error = None, None
        if benchmark:
            folder = run.folder.relative_to(outputs / model).as_posix()
            result = load_result(outputs, model, folder, benchmark.name, name)
            value = None if result is None else result.metrics.get(metric)
            error = None if result is None else result.metrics.get(f"{metric}_standard_error")
        else:
            value = next((row[metric] for row in reversed(run.log()) if metric in row), None)
        copied = any(run.record == other.run.record for other in found)  # a merged adapter has its run's record and log
        if value is not None and not copied:
            found.append(Measured(run, value, error, result))
    # A sweep on other pairs, perhaps a trial on few, would move a line for another reason than its hyperparameter.
    data = Counter(str(point.run.record.get("fingerprints")) for point in found)
    return [p for p in found if str(p.run.record.get("fingerprints")) == data.most_common(1)[0][0]]


def lines_over(key: str, points: list[Measured]) -> Lines:
    """A line for each combination of everything but `key`, with two values of it or more.

    Labels say what distinguishes the lines, learning rates first.
    """
    lines: dict[str, dict[float, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    settings: dict[str, dict] = {}
    for point in points:
        fixed = point.run.experiment()
        fixed["objective"] = {name: value for name, value in point.run.objective.items() if name != key}
        line = json_fingerprint(fixed)
        settings[line] = fixed
        lines[line][point.run.objective[key]].append(point)
    drawn = {line: dict(sorted(values.items())) for line, values in lines.items() if len(values) > 1}
    names = dict.fromkeys(["learning_rate", *(name for line in drawn for name in settings[line])])
    varying = [name for name in names if len({str(settings[line].get(name)) for line in drawn}) > 1]
    labels = {
        line: ", ".join(f"{LABELS.get(name, name)} {settings[line].get(name, 'default')}" for name in varying)
        for line in drawn
    }
    ordered = sorted(drawn, key=lambda line: (settings[line]["learning_rate"], labels[line]))
    return {labels[line]: drawn[line] for line in ordered}


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
            values = [point.value for point in points]
            if len(points) > 1:
                seeds = len({point.run.seed for point in points}) > 1
                low, high = min(values), max(values)
                kinds.add(f"lowest and highest of several {'seeds' if seeds else 'runs'}")
            elif points[0].error is not None:
                low, high = values[0] - points[0].error, values[0] + points[0].error
                kinds.add("± 1 standard error of the evaluation")
            else:
                continue
            axis.vlines(xs.index(x), low, high, linewidth=1, **style)
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)
    return kinds
