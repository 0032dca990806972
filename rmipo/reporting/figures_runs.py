"""Figures made from run folders and result files: 2 (sensitivity), 5 (HH win rates), 7 (cost and training curves)."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation import benchmark_of, metric_label
from rmipo.fingerprints import json_fingerprint
from rmipo.plots import GREY, draw_costs, draw_curves, footnotes, house_style, method_color, panel_letter, panels
from rmipo.reporting.paired import interval_text, paired_difference, paired_line, paired_title
from rmipo.reporting.provenance import figure_notes, require_comparable
from rmipo.reporting.results import (
    OURS,
    PAPER_MODELS,
    RECIPES,
    ReportError,
    Result,
    RunFolder,
    eval_command,
    find_runs,
    load_result,
    load_run,
    method_label,
    model_label,
    paper_table,
    train_command,
)

FIGURE5_METHODS = ("dpo", "simpo", "simper", "rmipo")
HH_SUBSETS = ("helpful", "harmless")
FIGURE7_METHODS = ("dpo", "beta-dpo", "epsilon-dpo", "alpha-dpo", "simpo", "simper", "rmipo")


class Measured(NamedTuple):
    """A finished run with its value of the metric, and the evaluation that it was read from, if it was."""

    run: RunFolder
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
    # The paper varies one at a time, the other at its default.
    over_beta, over_gamma = (
        [p for p in simpo if p.run.objective[key] == value] for key, value in (("gamma", 1.0), ("beta", 2.0))
    )
    panel_runs = [
        ("DPO, varying $\\beta$", "dpo", "beta", dpo),
        ("SimPO, varying $\\beta$ ($\\gamma=1.0$)", "simpo", "beta", over_beta),
        ("SimPO, varying $\\gamma$ ($\\beta=2.0$)", "simpo", "gamma", over_gamma),
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
            folder = run.folder.relative_to(outputs / model).as_posix()
            result = load_result(outputs, model, folder, benchmark.name, name)
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


HHResults = dict[str, dict[str, Result]]  # method -> subset -> the result that scored it


@house_style
def figure5(outputs: Path, model: str) -> Figure:
    """HH win rates (share of test pairs with A(w) > A(l)) by method; black lines: the paper's averages."""
    # As in the paper each subset is judged by the model trained on it, where any of those was evaluated. Otherwise <model>
    # itself judges both, for every method, and the paper has no number to stand beside.
    on_hh = hh_results(outputs, {subset: f"{model}-hh-{subset}" for subset in HH_SUBSETS})
    by_itself = hh_results(outputs, dict.fromkeys(HH_SUBSETS, model))
    results = on_hh or by_itself  # models of both kinds in one figure would be no comparison
    if not results:
        own = f"{model}-hh-helpful" if (RECIPES / f"{model}-hh-helpful").is_dir() else model
        commands = f"`{train_command(own, 'rmipo')}`, then `{eval_command(own, 'rmipo', 'hh')}`"
        raise ReportError(f"figure 5 has no HH results of {model}: run {commands}, the same for other methods")
    shown = [result for found in results.values() for result in found.values()]
    # A bar of another judge of pairs, or of other pairs, would look like a better method.
    require_comparable("figure 5", shown)
    printed = paper_table("figure5").query("setting == @model").set_index("method")["average_win_rate"] if on_hh else {}

    groups = {"hh_helpful": "Helpful", "hh_harmless": "Harmless", "hh_average": "Average"}
    figure, (axis,) = panels(1, height=3.0)
    width = 0.8 / len(results)
    for index, (method, found) in enumerate(results.items()):
        rates = hh_rates(found)
        positions = [x + (index - (len(results) - 1) / 2) * width for x, name in enumerate(groups) if name in rates]
        values, errors = zip(*(rates[name] for name in groups if name in rates), strict=True)
        axis.bar(positions, values, 0.92 * width, color=method_color(method), label=method_label(method))
        axis.errorbar(positions, values, errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        if method in printed and "hh_average" in rates:
            ends = positions[-1] - 0.46 * width, positions[-1] + 0.46 * width
            axis.hlines(printed[method], *ends, color="black", linewidth=1.6, zorder=3)
        # At the foot of the bar: at its top the paper's line or another bar's error would be read with it.
        for x, value in zip(positions, values, strict=True):
            style = {"textcoords": "offset points", "fontsize": 6.5, "color": "white", "fontweight": "bold"}
            axis.annotate(f"{value:.1f}", (x, 0), (0, 3), ha="center", **style)
    if len(printed):
        axis.plot([], [], color="black", linewidth=1.6, label="the paper's average")
    axis.axhline(50, color=GREY, linewidth=0.8, linestyle="--", label="chance")
    axis.set_ylim(0, None)  # a bar's length is its value
    axis.margins(y=0.08)
    axis.set_xticks(range(len(groups)), list(groups.values()))
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("Win rate (%)")
    trained = "trained on the HH subset (average: one model each)" if on_hh else "not trained on HH"
    axis.set_title(f"{model_label(model)}, {trained}{on_other_pairs(shown)}", loc="left")
    figure.legend(ncols=len(results) + 2, loc="outside upper center")
    notes = ["Bars: 95% interval over pairs (1.96 standard errors)."]
    if left_out := [method_label(method) for method in by_itself if method not in results]:
        notes.append(f"Not trained on HH, left out: {', '.join(left_out)}.")
    footnotes(figure, [*notes, *paired_notes(results), *figure_notes(shown)])
    return figure


def hh_results(outputs: Path, models: dict[str, str]) -> HHResults:
    """`models`: the model that judges each subset. Methods without any result are left out."""
    found: HHResults = {}
    for method in FIGURE5_METHODS:
        for subset, model in models.items():
            result = load_result(outputs, model, method, "hh")
            if result is not None and f"hh_{subset}" in result.metrics:
                found.setdefault(method, {})[subset] = result
    return found


def on_other_pairs(results: list[Result]) -> str:
    """For a title: which pairs were scored in place of Anthropic's."""
    other = sorted({path for result in results for path in result.settings.get("other_pairs") or []})
    return f"; not Anthropic's pairs: {', '.join(other)}" if other else ""


def paired_notes(results: HHResults) -> list[str]:
    """RMiPO against the other methods of figure 5, pair by pair, a line for each subset."""
    notes = []
    for subset in HH_SUBSETS:
        found = {method: [of[subset]] for method, of in results.items() if subset in of}
        ours = found.pop(OURS, [])
        differences = {m: paired_difference(ours, theirs, f"hh_{subset}") for m, theirs in found.items()}
        texts = [(method, interval_text(value, 1)) for method, value in differences.items() if value is not None]
        notes += paired_line(metric_label(f"hh_{subset}"), texts)
    return [paired_title(OURS), *notes] if notes else []


def hh_rates(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """hh_helpful, hh_harmless and, with both, hh_average: (percent, half of its 95% interval)."""
    rates = {}
    for subset, result in results.items():
        name = f"hh_{subset}"
        rates[name] = result.metrics[name], 1.96 * result.metrics.get(f"{name}_standard_error", 0.0)
    if len(rates) == 2:  # an average of one subset would be another number
        (first, error1), (second, error2) = rates.values()
        # The subsets' pairs are independent, also where one model scored both.
        rates["hh_average"] = (first + second) / 2, (error1**2 + error2**2) ** 0.5 / 2
    return rates


@house_style
def figure7(outputs: Path, model: str) -> Figure:
    """Hours and peak memory of finished runs; margin and win rate over training, in units common to all methods."""
    runs = {method: load_run(outputs, model, method) for method in FIGURE7_METHODS}
    runs = {method: run for method, run in runs.items() if run is not None and run.finished}
    if not runs:
        raise ReportError(f"figure 7 has no finished runs of {model}: run `{train_command(model, 'rmipo')}`")
    figure, (cost, margin, accuracy) = panels(3, height=3.1, width_ratios=(1.15, 1, 1))
    kinds = draw_hours(cost, runs, model)
    for axis, key, scale in ((margin, "common/margin_avg_logp", 1.0), (accuracy, "common/acc_avg_logp", 100.0)):
        curves = []
        for method, run in runs.items():
            values = scale * pd.Series({row["step"]: row[key] for row in run.log() if key in row})
            # A twentieth of the run: batches of few pairs jump by more than methods differ.
            smoothed = values.rolling(max(1, len(values) // 20), min_periods=1).mean()
            curves.append(pd.DataFrame({"method": method, "step": values.index, "value": smoothed.values}))
        draw_curves(axis, pd.concat(curves), "value", method_label)
    margin.set_ylabel("$A(y_w|x)-A(y_l|x)$\n(nats per token)")
    accuracy.set_ylabel("Pairs with $A(y_w|x)>A(y_l|x)$")
    accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel_letter(margin, "b", "Margin")
    panel_letter(accuracy, "c", "Win rate")
    handles, labels = margin.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    numbered = [f"[{number}] {kind}" for number, kind in enumerate(kinds, start=1)] if len(kinds) > 1 else kinds
    versions = [", ".join(f"{name} {version}" for name, version in r.record["versions"].items()) for r in runs.values()]
    notes = [f"{model_label(model)}. Hardware: {'; '.join(numbered)}."]
    notes += dict.fromkeys(f"Trained with {version}." for version in versions)
    if model in PAPER_MODELS and not all(map(is_papers, kinds)):
        notes.append("The paper's hours are of four A800 and are not drawn beside those of other hardware.")
    footnotes(figure, notes)
    return figure


def draw_hours(axis: Axes, runs: dict[str, RunFolder], model: str) -> list[str]:
    """Bars of a run's hours, start to saved model, with peak memory on them; returns the kinds of hardware.

    The paper's hours are open diamonds, its memory is in brackets.
    """
    printed = paper_table("efficiency").set_index("method").to_dict("index") if model in PAPER_MODELS else {}
    devices = {method: Counter(run.record.get("hardware", ["unknown hardware"])) for method, run in runs.items()}
    # E.g. "4 x NVIDIA A800-SXM4-80GB".
    hardware = {m: ", ".join(f"{count} x {name}" for name, count in found.items()) for m, found in devices.items()}
    kinds = list(dict.fromkeys(hardware.values()))
    # Hours of other hardware are no comparison: runs of one kind stand together, under its number.
    in_order = sorted(runs, key=lambda method: kinds.index(hardware[method]))
    in_minutes = max(run.record["seconds"] for run in runs.values()) < 3600
    xlabel, lengths, names, memory = "Minutes of the run" if in_minutes else "Hours of the run", {}, [], []
    for place, method in enumerate(in_order):
        run, paper = runs[method], printed.get(method, {})
        lengths[method] = run.record["seconds"] / (60 if in_minutes else 3600)
        memory.append(f"{max(row.get('peak_memory_gib', 0.0) for row in run.log()):.1f} GiB")
        if paper.get("peak_memory_percent", 0) > 0:
            memory[-1] += f" (paper {paper['peak_memory_percent']:.0f}%)"
        if paper and is_papers(hardware[method]) and not in_minutes:
            axis.plot(paper["hours"], place, "D", markersize=4, mfc="white", mec="black", mew=0.8)
        number = f" [{kinds.index(hardware[method]) + 1}]" if len(kinds) > 1 else ""  # explained under the figure
        names.append(method_label(method) + "*" * (run.record["starts"] > 1) + number)
    xlabel += r" ($\diamond$: paper)" * bool(axis.lines)
    xlabel += "\n(paper %): of its 80 GB" * any("paper" in text for text in memory)
    xlabel += "\n*: since its last start" * any(run.record["starts"] > 1 for run in runs.values())
    draw_costs(axis, lengths, memory, names, xlabel)
    return kinds


def is_papers(hardware: str) -> bool:
    """Whether hours may stand beside the paper's, which are of four A800."""
    return hardware.startswith("4 x ") and "A800" in hardware
