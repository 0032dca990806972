"""Figures made from run folders and result files: 5 (HH win rates), 7 (cost and training curves)."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from rmipo.reporting.figures import GREY, house_style, method_color, method_label, panel_letter, panels, smooth
from rmipo.reporting.provenance import require_comparable
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
    require_comparable("figure 5", [result for found in results.values() for result in found.values()])
    rates = {method: hh_rates(found) for method, found in results.items()}
    printed = paper_table("figure5").query("setting == @model and @trained_on_hh").set_index("method")
    paper = printed["average_win_rate"].to_dict()
    groups = {"hh_helpful": "Helpful", "hh_harmless": "Harmless", "hh_average": "Average"}
    figure, (axis,) = panels(1, height=2.4)
    width = 0.8 / len(results)
    lowest = 100.0
    for index, (method, shown_rates) in enumerate(rates.items()):
        shown = [(x, shown_rates[name]) for x, name in enumerate(groups) if name in shown_rates]
        positions = [x + (index - (len(rates) - 1) / 2) * width for x, _ in shown]
        values = [value for _, value in shown]
        axis.bar(positions, values, 0.92 * width, color=method_color(method), label=method_label(method))
        tops = list(values)
        if method in paper and "hh_average" in shown_rates:
            x, tops[-1] = positions[-1], max(values[-1], paper[method])
            axis.hlines(paper[method], x - 0.46 * width, x + 0.46 * width, color="black", linewidth=1.6, zorder=3)
        for x, top, value in zip(positions, tops, values, strict=True):
            axis.annotate(f"{value:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
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
    axis.set_title(f"{model_label(model)}, {trained}", loc="left")
    if left_out:
        axis.set_xlabel(f"Not trained on HH, left out: {', '.join(left_out)}", fontsize=7)
    figure.legend(ncols=len(results) + 1, loc="outside lower center")
    return figure


def results_on_hh(outputs: Path, model: str, method: str) -> dict[str, Result]:
    """Subset -> the HH result of the model trained on it, where there is one."""
    found = {subset: load_result(outputs, f"{model}-hh-{subset}", method, "hh") for subset in HH_SUBSETS}
    return {subset: result for subset, result in found.items() if result and f"hh_{subset}" in result.metrics}


def hh_rates(results: dict[str, Result]) -> dict[str, float]:
    """hh_helpful, hh_harmless and, with both, hh_average, in percent; a subset that wasn't scored is left out."""
    names = {f"hh_{subset}": result for subset, result in results.items()}
    rates = {name: result.metrics[name] for name, result in names.items() if name in result.metrics}
    return rates | ({"hh_average": sum(rates.values()) / 2} if len(rates) == 2 else {})


@house_style
def figure7(outputs: Path, model: str) -> Figure:
    """Hours and peak memory of finished runs; margin and win rate over training, in units common to all methods."""
    runs = {method: load_run(outputs, model, method) for method in FIGURE7_METHODS}
    runs = {method: run for method, run in runs.items() if run is not None and run.finished}
    if not runs:
        raise ReportError(
            f"figure 7 has no finished runs of {model} below {outputs}: run `{train_command(model, 'rmipo')}`"
        )
    figure, (cost, margin, accuracy) = panels(3, height=2.7, width_ratios=(1.15, 1, 1))
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
    margin.set_ylabel("$A(y_w|x)-A(y_l|x)$ (nats)")
    accuracy.set_ylabel("Pairs with $A(y_w|x)>A(y_l|x)$")
    accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel_letter(margin, "b", "Margin")
    panel_letter(accuracy, "c", "Win rate")
    handles, labels = margin.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside lower center")
    return figure


def draw_costs(axis: Axes, runs: dict[str, Run], model: str) -> None:
    """Bars of a run's hours, start to saved model, with peak memory on them.

    For the paper's models its hours are open diamonds, and its memory is in brackets.
    """
    printed = paper_table("efficiency").set_index("method") if model in PAPER_MODELS else {}
    paper = dict(printed.get("hours", {}))
    paper_memory = {
        method: f" ({percent:.0f}%)"
        for method, percent in printed.get("peak_memory_percent", {}).items()
        if percent > 0
    }
    methods = list(runs)
    hours = [run.record["seconds"] / 3600 for run in runs.values()]
    memory = {method: max(row.get("peak_memory_gib", 0.0) for row in run.log()) for method, run in runs.items()}
    in_minutes = max(hours) < 1
    values = [60 * value for value in hours] if in_minutes else hours
    axis.barh(range(len(methods)), values, 0.7, color=[method_color(method) for method in methods])
    for row, method in enumerate(methods):
        text = f"{memory[method]:.1f} GiB{paper_memory.get(method, '')}"
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axis.annotate(text, (0, row), path_effects=[withStroke(linewidth=2, foreground="white")], **place)
    label = "Minutes of the run" if in_minutes else "Hours of the run"
    if paper and not in_minutes:
        known = [(paper[method], row) for row, method in enumerate(methods) if method in paper]
        axis.plot(*zip(*known, strict=True), "D", markersize=4, mfc="white", mec="black", mew=0.8)
        label += r" ($\diamond$: paper)"
    if paper_memory:
        label += "\n(%): the paper's memory, of 80 GB"
    resumed = [method for method, run in runs.items() if run.record["starts"] > 1]
    if resumed:
        label += "\n*: since its last start"
    marks = ["*" if method in resumed else "" for method in methods]
    axis.set_yticks(range(len(methods)), [method_label(m) + mark for m, mark in zip(methods, marks, strict=True)])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
    panel_letter(axis, "a", "Time and peak memory")
