"""Figures made from run folders and result files: 2 (sensitivity), 5 (HH win rates), 7 (cost and training curves)."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .figures import GREY, house_style, method_color, method_label, panel_letter, panels, smooth
from .results import (
    BENCH_OF_METRIC,
    PAPER_MODELS,
    RECIPES,
    ReportError,
    Result,
    Run,
    eval_command,
    find_runs,
    load_result,
    load_run,
    paper_rows,
    require_same_versions,
    train_command,
)
from .tables import METRIC_LABELS, model_label

FIGURE5_METHODS = ("dpo", "simpo", "simper", "rmipo")
FIGURE7_METHODS = ("dpo", "beta-dpo", "epsilon-dpo", "alpha-dpo", "simpo", "simper", "rmipo")


@house_style
def figure2(outputs: Path, model: str, metric: str = "mt_bench") -> Figure:
    """`metric` over DPO's beta, SimPO's beta at gamma 1.0, and SimPO's gamma at beta 2.0; dashed: before training.

    Every run folder below outputs/<model> counts, whatever it is called: hyperparameters are read from run.json.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_rewards/accuracies, ...).
    """
    runs = on_the_same_data(find_runs(outputs, model))
    curves = {
        ("dpo", "beta", "DPO, varying $\\beta$"): lambda objective: True,
        ("simpo", "beta", "SimPO, varying $\\beta$ ($\\gamma=1.0$)"): lambda objective: objective["gamma"] == 1.0,
        ("simpo", "gamma", "SimPO, varying $\\gamma$ ($\\beta=2.0$)"): lambda objective: objective["beta"] == 2.0,
    }
    figure, axes = panels(len(curves), sharey=True)
    start = load_result(outputs / model / "initial", BENCH_OF_METRIC.get(metric, ""))
    for axis, letter, ((method, key, title), belongs) in zip(axes, "abc", curves.items(), strict=True):
        chosen = [run for run in runs if run.objective.get("name") == method and belongs(run.objective)]
        lines = sensitivity(chosen, key, metric)
        if not lines:
            evaluate = f", then `make eval ... BENCH={BENCH_OF_METRIC[metric]}`" if metric in BENCH_OF_METRIC else ""
            raise ReportError(
                f"figure 2 needs two or more {method} runs of {model} that differ in {key} alone and have {metric}; "
                f"there are none below {outputs / model}: run `make sweep MODEL={model} METHOD={method}`{evaluate}"
            )
        draw_sensitivity(axis, lines, method_color(method))
        if start is not None:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(METRIC_LABELS.get(metric, metric))
    return figure


def on_the_same_data(runs: list[Run]) -> list[Run]:
    """The runs on the data that most of them were trained on: those on other pairs are no points of a curve."""
    data = [str(run.record.get("fingerprints")) for run in runs]
    return [run for run, seen in zip(runs, data, strict=True) if seen == max(data, key=data.count)]


def sensitivity(runs: list[Run], key: str, metric: str) -> dict[float, dict[float, float]]:
    """Learning rate -> value of the hyperparameter `key` -> metric, for rates with two or more values."""
    lines: dict[float, dict[float, float]] = {}
    for run in runs:
        value = run_metric(run, metric)
        if value is not None:
            lines.setdefault(run.record["recipe"]["learning_rate"], {})[run.objective[key]] = value
    return {rate: points for rate, points in sorted(lines.items()) if len(points) > 1}


def draw_sensitivity(axis: Axes, lines: dict[float, dict[float, float]], color: str) -> None:
    xs = sorted({x for points in lines.values() for x in points})  # evenly spaced: the grids fit no one scale
    shades = np.linspace(0.4, 1, len(lines)) if len(lines) > 1 else [1]
    for (rate, points), marker, shade in zip(lines.items(), "osD^v<>", shades, strict=False):
        at = [x for x in xs if x in points]
        positions, values = [xs.index(x) for x in at], [points[x] for x in at]
        axis.plot(positions, values, marker=marker, markersize=4.5, color=color, alpha=shade, label=f"lr {rate:g}")
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)


def run_metric(run: Run, metric: str) -> float | None:
    """A metric of a run: from its evaluation, or else the last one logged; None where there is none."""
    if metric in BENCH_OF_METRIC:
        result = load_result(run.folder, BENCH_OF_METRIC[metric])
        return None if result is None else result.metrics[metric]
    values = [row[metric] for row in run.log() if metric in row]
    return values[-1] if values else None


@house_style
def figure5(outputs: Path, model: str) -> Figure:
    """HH win rates (share of test pairs with A(w) > A(l)) by method; black lines: the paper's averages.

    As in the paper each subset is judged by the model trained on it, <model>-hh-helpful and <model>-hh-harmless, where
    those were evaluated; otherwise both by <model> itself.
    """
    results = {method: hh_results(outputs, model, method) for method in FIGURE5_METHODS}
    results = {method: found for method, found in results.items() if found}
    if not results:
        trained = f"{model}-hh-helpful" if (RECIPES / f"{model}-hh-helpful").is_dir() else model
        raise ReportError(
            f"figure 5 has no HH results of {model}: run `{train_command(trained, 'rmipo')}`, then "
            f"`{eval_command(trained, 'rmipo', 'hh')}`, and the same for any of {', '.join(FIGURE5_METHODS[:-1])}"
            + (f"; likewise for {model}-hh-harmless" if trained != model else "")
        )
    require_same_versions("figure 5", [result for found in results.values() for result in found.values()])
    rates = {method: hh_rates(found) for method, found in results.items()}
    paper = {row["method"]: float(row["average_win_rate"]) for row in paper_rows("figure5") if row["setting"] == model}
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
    axis.set_ylabel("Win rate of chosen (%)")
    axis.set_title(f"{model_label(model)}, HH evaluation", loc="left")
    figure.legend(ncols=len(results) + 1, loc="outside lower center")
    return figure


def hh_results(outputs: Path, model: str, method: str) -> dict[str, Result]:
    """Subset -> the result that its win rate is read from; see `figure5`."""
    pair = {subset: load_result(outputs / f"{model}-hh-{subset}" / method, "hh") for subset in ("helpful", "harmless")}
    if not any(pair.values()):
        pair = dict.fromkeys(pair, load_result(outputs / model / method, "hh"))
    return {subset: result for subset, result in pair.items() if result and f"hh_{subset}" in result.metrics}


def hh_rates(results: dict[str, Result]) -> dict[str, float]:
    rates = {f"hh_{subset}": result.metrics[f"hh_{subset}"] for subset, result in results.items()}
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
    figure, (cost, margin, accuracy) = panels(3, height=2.5, width_ratios=(1.15, 1, 1))
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
    """Bars of a run's hours, start to saved model, with peak memory on them; the paper's hours as open diamonds."""
    paper = {row["method"]: float(row["hours"]) for row in paper_rows("efficiency")} if model in PAPER_MODELS else {}
    methods = list(runs)
    hours = [run.record["seconds"] / 3600 for run in runs.values()]
    memory = {method: max(row.get("peak_memory_gib", 0.0) for row in run.log()) for method, run in runs.items()}
    in_minutes = max(hours) < 1
    values = [60 * value for value in hours] if in_minutes else hours
    axis.barh(range(len(methods)), values, 0.7, color=[method_color(method) for method in methods])
    for row, method in enumerate(methods):
        ink = "black" if np.mean(to_rgb(method_color(method))) > 0.5 else "white"
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axis.annotate(f"{memory[method]:.1f} GiB", (0, row), color=ink, **place)
    label = "Time of the run (minutes)" if in_minutes else "Time of the run (hours)"
    if paper and not in_minutes:
        known = [(paper[method], row) for row, method in enumerate(methods) if method in paper]
        axis.plot(*zip(*known, strict=True), "D", markersize=4, mfc="white", mec="black", mew=0.8)
        label += r", $\diamond$: paper"
    resumed = [method for method, run in runs.items() if run.record["starts"] > 1]
    if resumed:
        label += ", *: since its last start"
    marks = ["*" if method in resumed else "" for method in methods]
    axis.set_yticks(range(len(methods)), [method_label(m) + mark for m, mark in zip(methods, marks, strict=True)])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
    panel_letter(axis, "a", "Time and peak memory")
