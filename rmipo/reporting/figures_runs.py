"""Figures made from run folders and result files: 5 (HH win rates), 7 (cost and training curves)."""

from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation import metric_label
from rmipo.reporting.figures import (
    GREY,
    footnotes,
    house_style,
    method_color,
    method_label,
    panel_letter,
    panels,
    smooth,
)
from rmipo.reporting.paired import OURS, PAIRED_TITLE, paired_difference, paired_note
from rmipo.reporting.provenance import figure_notes, require_comparable
from rmipo.reporting.results import (
    PAPER_MODELS,
    RECIPES,
    ReportError,
    Result,
    Run,
    eval_command,
    load_result,
    load_run,
    model_label,
    paper_table,
    train_command,
)

FIGURE5_METHODS = ("dpo", "simpo", "simper", "rmipo")
HH_SUBSETS = ("helpful", "harmless")
FIGURE7_METHODS = ("dpo", "beta-dpo", "epsilon-dpo", "alpha-dpo", "simpo", "simper", "rmipo")


@house_style
def figure5(outputs: Path, model: str) -> Figure:
    """HH win rates (share of test pairs with A(w) > A(l)) by method; black lines: the paper's averages.

    As in the paper each subset is judged by the model trained on it, <model>-hh-helpful and <model>-hh-harmless, where
    any of those was evaluated; otherwise both, of every method, by <model> itself, without the paper's numbers.
    """
    on_hh = {method: results_on_hh(outputs, model, method) for method in FIGURE5_METHODS}
    by_itself = {method: load_result(outputs, model, method, "hh") for method in FIGURE5_METHODS}
    trained_on_hh = any(on_hh.values())
    if trained_on_hh:
        results = {method: found for method, found in on_hh.items() if found}
    else:
        results = {method: dict.fromkeys(HH_SUBSETS, found) for method, found in by_itself.items() if found}
    left_out = [method_label(method) for method, found in by_itself.items() if found and method not in results]
    if not results:
        trained = f"{model}-hh-helpful" if (RECIPES / f"{model}-hh-helpful").is_dir() else model
        raise ReportError(
            f"figure 5 has no HH results of {model}: run `{train_command(trained, 'rmipo')}`, then "
            f"`{eval_command(trained, 'rmipo', 'hh')}`, and the same for any of {', '.join(FIGURE5_METHODS[:-1])}"
            + (f"; likewise for {model}-hh-harmless" if trained != model else "")
        )
    shown = [result for found in results.values() for result in found.values()]
    require_comparable("figure 5", shown)
    rates = {method: hh_rates(found) for method, found in results.items()}
    printed = paper_table("figure5").query("setting == @model and @trained_on_hh").set_index("method")
    paper = printed["average_win_rate"].to_dict()
    groups = {"hh_helpful": "Helpful", "hh_harmless": "Harmless", "hh_average": "Average"}
    figure, (axis,) = panels(1, height=2.4)
    width = 0.8 / len(results)
    lowest = 100.0
    for index, (method, shown_rates) in enumerate(rates.items()):
        drawn = [(x, *shown_rates[name]) for x, name in enumerate(groups) if name in shown_rates]
        positions = [x + (index - (len(rates) - 1) / 2) * width for x, _, _ in drawn]
        values, errors = [value for _, value, _ in drawn], [error for _, _, error in drawn]
        axis.bar(positions, values, 0.92 * width, color=method_color(method), label=method_label(method))
        axis.errorbar(positions, values, errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
        if method in paper and "hh_average" in shown_rates:
            x = positions[-1]
            axis.hlines(paper[method], x - 0.46 * width, x + 0.46 * width, color="black", linewidth=1.6, zorder=3)
        # At the foot of the bar: at its top the paper's line or another bar's error would be read with it.
        for x, value in zip(positions, values, strict=True):
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "white"}
            axis.annotate(f"{value:.1f}", (x, 0), xycoords=axis.get_xaxis_transform(), fontweight="bold", **place)
        lowest = min(lowest, *values)
    if paper:
        axis.plot([], [], color="black", linewidth=1.6, label="the paper's average")
    axis.axhline(50, color=GREY, linewidth=0.8, linestyle="--")  # chance
    axis.set_ylim(50 if lowest > 50 else 5 * np.floor(lowest / 5) - 5, None)
    axis.margins(y=0.12)
    axis.set_xticks(range(len(groups)), list(groups.values()))
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("Win rate (%; chance: 50)")
    trained = "trained on the HH subset (average: one model each)" if trained_on_hh else "not trained on HH"
    axis.set_title(f"{model_label(model)}, {trained}{on_other_pairs(shown)}", loc="left")
    figure.legend(ncols=len(results) + 1, loc="outside upper center")
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
        differences = [(method, paired_difference(ours, theirs, f"hh_{subset}")) for method, theirs in found.items()]
        notes += paired_note(metric_label(f"hh_{subset}"), differences, 1)
    return [PAIRED_TITLE, *notes] if notes else []


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
        rates["hh_average"] = (first + second) / 2, (error1**2 + error2**2) ** 0.5 / 2
    return rates


@house_style
def figure7(outputs: Path, model: str) -> Figure:
    """Hours and peak memory of finished runs; margin and win rate over training, in units common to all methods."""
    runs = {method: load_run(outputs, model, method) for method in FIGURE7_METHODS}
    runs = {method: run for method, run in runs.items() if run is not None and run.finished}
    if not runs:
        raise ReportError(
            f"figure 7 has no finished runs of {model} below {outputs}: run `{train_command(model, 'rmipo')}`"
        )
    figure, (cost, margin, accuracy) = panels(3, height=3.1, width_ratios=(1.15, 1, 1))
    draw_costs(cost, runs, model)
    curves = ((margin, "common/margin_avg_logp", 1.0), (accuracy, "common/acc_avg_logp", 100.0))
    for method, run in runs.items():
        for axis, key, scale in curves:
            rows = [row for row in run.log() if key in row]
            if len(rows) < 2:
                raise ReportError(f"{run.folder}/metrics.jsonl has {len(rows)} lines with {key}; lower logging_steps")
            values = scale * np.array([row[key] for row in rows])
            window = max(1, len(values) // 20)
            axis.plot(
                [row["step"] for row in rows],
                smooth(values, window),
                color=method_color(method),
                linewidth=1.8 if method == "rmipo" else 1.1,
                label=method_label(method),
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
    notes = [f"{model_label(model)}. Hardware: {'; '.join(kinds)}.", *made_with]
    if model in PAPER_MODELS and not all(map(is_papers, kinds)):
        notes.append("The paper's hours are of four A800 and are not drawn beside those of other hardware.")
    footnotes(figure, notes)
    return figure


def draw_costs(axis: Axes, runs: dict[str, Run], model: str) -> None:
    """Bars of a run's hours, start to saved model, with peak memory on them; runs of one hardware stand together.

    Where the hardware is the paper's, its hours are open diamonds; its memory is in brackets for the paper's models.
    """
    printed = paper_table("efficiency").set_index("method") if model in PAPER_MODELS else {}
    paper_memory = {
        method: f" (paper {percent:.0f}%)"
        for method, percent in printed.get("peak_memory_percent", {}).items()
        if percent > 0
    }
    hardware = {method: hardware_of(run) for method, run in runs.items()}
    kinds = list(dict.fromkeys(hardware.values()))
    hours = {method: run.record["seconds"] / 3600 for method, run in runs.items()}
    in_minutes = max(hours.values()) < 1
    scale = 60 if in_minutes else 1
    # Hours of other hardware are no comparison: each kind has a block of its own, under its name.
    places: dict[str, float] = {}
    for block, kind in enumerate(kinds):
        for method in (method for method in runs if hardware[method] == kind):
            places[method] = len(places) + (block + 1) * (len(kinds) > 1)
        if len(kinds) > 1:
            first = min(places[method] for method in places if hardware[method] == kind)
            axis.text(0, first - 0.45, f" {kind}", fontsize=6, style="italic", va="bottom")
    axis.barh(list(places.values()), [scale * hours[m] for m in places], 0.7, color=[method_color(m) for m in places])
    for method, place in places.items():
        memory = max(row.get("peak_memory_gib", 0.0) for row in runs[method].log())
        text = f"{memory:.1f} GiB{paper_memory.get(method, '')}"
        style = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
        axis.annotate(text, (0, place), path_effects=[withStroke(linewidth=2, foreground="white")], **style)
    label = "Minutes of the run" if in_minutes else "Hours of the run"
    known = [
        (printed["hours"][m], places[m]) for m in places if m in printed.get("hours", {}) and is_papers(hardware[m])
    ]
    if known and not in_minutes:
        axis.plot(*zip(*known, strict=True), "D", markersize=4, mfc="white", mec="black", mew=0.8)
        label += r" ($\diamond$: paper)"
    if any(method in paper_memory for method in places):
        label += "\n(paper %): of its 80 GB"
    resumed = [method for method, run in runs.items() if run.record["starts"] > 1]
    if resumed:
        label += "\n*: since its last start"
    marks = ["*" if method in resumed else "" for method in places]
    axis.set_yticks(list(places.values()), [method_label(m) + mark for m, mark in zip(places, marks, strict=True)])
    axis.set_ylim(max(places.values()) + 0.6, min(places.values()) - (1.1 if len(kinds) > 1 else 0.6))
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
    panel_letter(axis, "a", "Time and peak memory")


def hardware_of(run: Run) -> str:
    """E.g. "4 x NVIDIA A800-SXM4-80GB", from run.json."""
    return ", ".join(
        f"{count} x {name}" for name, count in Counter(run.record.get("hardware", ["unknown hardware"])).items()
    )


def versions_of(run: Run) -> str:
    """E.g. "torch 2.13.0, transformers 5.23.0", from run.json."""
    return ", ".join(f"{package} {version}" for package, version in run.record["versions"].items())


def is_papers(hardware: str) -> bool:
    """Whether hours may stand beside the paper's, which are of four A800."""
    return hardware.startswith("4 x ") and "A800" in hardware
