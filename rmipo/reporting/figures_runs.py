"""Figures made from run folders and result files: 5 (HH win rates), 7 (cost and training curves)."""

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation import metric_label
from rmipo.plots import GREY, house_style, method_color, panel_letter, panels
from rmipo.reporting.figures import footnotes, smooth
from rmipo.reporting.paired import interval_text, paired_difference, paired_line, paired_title
from rmipo.reporting.provenance import figure_notes, require_comparable
from rmipo.reporting.results import (
    OURS,
    PAPER_MODELS,
    RECIPES,
    ReportError,
    Result,
    TrainingRun,
    eval_command,
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
WHITE_BEHIND = [withStroke(linewidth=2, foreground="white")]


@house_style
def figure5(outputs: Path, model: str) -> Figure:
    """HH win rates (share of test pairs with A(w) > A(l)) by method; black lines: the paper's averages.

    As in the paper each subset is judged by the model trained on it, <model>-hh-helpful and <model>-hh-harmless, where
    any of those was evaluated; otherwise both, of every method, by <model> itself, without the paper's numbers.
    """
    on_hh = {method: results_on_hh(outputs, model, method) for method in FIGURE5_METHODS}
    by_itself = {method: load_result(outputs, model, method, "hh") for method in FIGURE5_METHODS}
    trained_on_hh = any(on_hh.values())  # one such model, and models of both kinds would share a figure
    if trained_on_hh:
        results = {method: found for method, found in on_hh.items() if found}
    else:
        results = {method: dict.fromkeys(HH_SUBSETS, found) for method, found in by_itself.items() if found}
    if not results:
        own = f"{model}-hh-helpful" if (RECIPES / f"{model}-hh-helpful").is_dir() else model
        commands = f"`{train_command(own, 'rmipo')}`, then `{eval_command(own, 'rmipo', 'hh')}`"
        raise ReportError(f"figure 5 has no HH results of {model}: run {commands}, the same for other methods")
    left_out = [method_label(method) for method, found in by_itself.items() if found and method not in results]
    shown = [result for found in results.values() for result in found.values()]
    require_comparable("figure 5", shown)
    printed = paper_table("figure5").query("setting == @model and @trained_on_hh").set_index("method")
    paper = printed["average_win_rate"].to_dict()

    groups = {"hh_helpful": "Helpful", "hh_harmless": "Harmless", "hh_average": "Average"}
    figure, (axis,) = panels(1, height=3.0)
    width = 0.8 / len(results)
    for index, (method, found) in enumerate(results.items()):
        rates = hh_rates(found)
        positions = [x + (index - (len(results) - 1) / 2) * width for x, name in enumerate(groups) if name in rates]
        values, errors = zip(*(rates[name] for name in groups if name in rates), strict=True)
        axis.bar(positions, values, 0.92 * width, color=method_color(method), label=method_label(method))
        axis.errorbar(positions, values, errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        if method in paper and "hh_average" in rates:
            x = positions[-1]
            axis.hlines(paper[method], x - 0.46 * width, x + 0.46 * width, color="black", linewidth=1.6, zorder=3)
        # At the foot of the bar: at its top the paper's line or another bar's error would be read with it.
        for x, value in zip(positions, values, strict=True):
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "white"}
            axis.annotate(f"{value:.1f}", (x, 0), fontweight="bold", **place)
    if paper:
        axis.plot([], [], color="black", linewidth=1.6, label="the paper's average")
    axis.axhline(50, color=GREY, linewidth=0.8, linestyle="--", label="chance")
    axis.set_ylim(0, None)  # a bar's length is its value
    axis.margins(y=0.08)
    axis.set_xticks(range(len(groups)), list(groups.values()))
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("Win rate (%)")
    trained = "trained on the HH subset (average: one model each)" if trained_on_hh else "not trained on HH"
    axis.set_title(f"{model_label(model)}, {trained}{on_other_pairs(shown)}", loc="left")
    figure.legend(ncols=len(results) + 2, loc="outside upper center")
    notes = [f"Not trained on HH, left out: {', '.join(left_out)}."] if left_out else []
    notes += paired_notes(results)
    footnotes(figure, ["Bars: 95% interval over pairs (1.96 standard errors).", *notes, *figure_notes(shown)])
    return figure


def on_other_pairs(results: list[Result]) -> str:
    """For a title: which pairs were scored in place of Anthropic's."""
    other = sorted({path for result in results for path in result.settings.get("other_pairs") or []})
    return f"; not Anthropic's pairs: {', '.join(other)}" if other else ""


def paired_notes(results: dict[str, dict[str, Result]]) -> list[str]:
    """RMiPO against the other methods of figure 5, pair by pair, a line for each subset; method -> subset -> result."""
    notes = []
    for subset in HH_SUBSETS:
        found = {method: [of[subset]] for method, of in results.items() if subset in of}
        ours = found.pop(OURS, [])
        differences = {m: paired_difference(ours, theirs, f"hh_{subset}") for m, theirs in found.items()}
        texts = [(method, interval_text(value, 1)) for method, value in differences.items() if value is not None]
        notes += paired_line(metric_label(f"hh_{subset}"), texts)
    return [paired_title(OURS), *notes] if notes else []


def results_on_hh(outputs: Path, model: str, method: str) -> dict[str, Result]:
    """Subset -> the HH result of the model trained on it, where there is one."""
    found = {subset: load_result(outputs, f"{model}-hh-{subset}", method, "hh") for subset in HH_SUBSETS}
    return {subset: result for subset, result in found.items() if result and f"hh_{subset}" in result.metrics}


def hh_rates(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """hh_helpful, hh_harmless and, with both, hh_average: (percent, half of its 95% interval).

    A subset that wasn't scored is left out; an error that wasn't recorded counts as 0.
    """
    rates = {}
    for subset, result in results.items():
        if (name := f"hh_{subset}") in result.metrics:
            rates[name] = result.metrics[name], 1.96 * result.metrics.get(f"{name}_standard_error", 0.0)
    if len(rates) == 2:
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
    draw_costs(cost, runs, model)
    curves = ((margin, "common/margin_avg_logp", 1.0), (accuracy, "common/acc_avg_logp", 100.0))
    for method, run in runs.items():
        # Dashed on top of the others: where two lines coincide, both are seen.
        style = {"linewidth": 1.8, "linestyle": (0, (3, 2)), "zorder": 4} if method == OURS else {"linewidth": 1.1}
        for axis, key, scale in curves:
            rows = [row for row in run.log() if key in row]
            values = scale * np.array([row[key] for row in rows])
            # A twentieth of the run: batches of few pairs jump by more than methods differ.
            smoothed = smooth(values, max(1, len(values) // 20))
            axis.plot(
                [row["step"] for row in rows], smoothed, color=method_color(method), label=method_label(method), **style
            )
    for axis in (margin, accuracy):
        axis.set_xlabel("Step")
        axis.margins(x=0.02)
    margin.set_ylabel("$A(y_w|x)-A(y_l|x)$\n(nats per token)")
    accuracy.set_ylabel("Pairs with $A(y_w|x)>A(y_l|x)$")
    accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel_letter(margin, "b", "Margin")
    panel_letter(accuracy, "c", "Win rate")
    handles, labels = margin.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    kinds = dict.fromkeys(hardware_of(run) for run in runs.values())
    made_with = dict.fromkeys(f"Trained with {versions_of(run)}." for run in runs.values())
    numbered = [f"[{number}] {kind}" for number, kind in enumerate(kinds, start=1)] if len(kinds) > 1 else kinds
    notes = [f"{model_label(model)}. Hardware: {'; '.join(numbered)}.", *made_with]
    if model in PAPER_MODELS and not all(map(is_papers, kinds)):
        notes.append("The paper's hours are of four A800 and are not drawn beside those of other hardware.")
    footnotes(figure, notes)
    return figure


def draw_costs(axis: Axes, runs: dict[str, TrainingRun], model: str) -> None:
    """Bars of a run's hours, start to saved model, with peak memory on them; runs of one hardware stand together.

    Where the hardware is the paper's, its hours are open diamonds; its memory is in brackets for the paper's models.
    """
    printed = paper_table("efficiency").set_index("method").to_dict("index") if model in PAPER_MODELS else {}
    kinds = list(dict.fromkeys(hardware_of(run) for run in runs.values()))
    # Hours of other hardware are no comparison: those of one kind stand together, under its number.
    methods = sorted(runs, key=lambda method: kinds.index(hardware_of(runs[method])))
    in_minutes = max(run.record["seconds"] for run in runs.values()) < 3600
    label = "Minutes of the run" if in_minutes else "Hours of the run"
    names, noted = [], ""
    for place, method in enumerate(methods):
        run, paper = runs[method], printed.get(method, {})
        length = run.record["seconds"] / (60 if in_minutes else 3600)
        axis.barh(place, length, 0.7, color=method_color(method))
        memory = f"{max(row.get('peak_memory_gib', 0.0) for row in run.log()):.1f} GiB"
        if paper.get("peak_memory_percent", 0) > 0:
            memory, noted = f"{memory} (paper {paper['peak_memory_percent']:.0f}%)", "\n(paper %): of its 80 GB"
        style = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
        axis.annotate(memory, (0, place), path_effects=WHITE_BEHIND, **style)
        if paper and is_papers(hardware_of(run)) and not in_minutes:
            axis.plot(paper["hours"], place, "D", markersize=4, mfc="white", mec="black", mew=0.8)
        number = f" [{kinds.index(hardware_of(run)) + 1}]" if len(kinds) > 1 else ""  # explained under the figure
        names.append(method_label(method) + "*" * (run.record["starts"] > 1) + number)
    label += r" ($\diamond$: paper)" * bool(axis.lines) + noted
    axis.set_xlabel(label + "\n*: since its last start" * any(run.record["starts"] > 1 for run in runs.values()))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)
    panel_letter(axis, "a", "Time and peak memory")


def hardware_of(run: TrainingRun) -> str:
    """E.g. "4 x NVIDIA A800-SXM4-80GB", from run.json."""
    counts = Counter(run.record.get("hardware", ["unknown hardware"]))
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def versions_of(run: TrainingRun) -> str:
    """E.g. "torch 2.13.0, transformers 5.23.0", from run.json."""
    return ", ".join(f"{package} {version}" for package, version in run.record["versions"].items())


def is_papers(hardware: str) -> bool:
    """Whether hours may stand beside the paper's, which are of four A800."""
    return hardware.startswith("4 x ") and "A800" in hardware
