"""Figures made from run folders and result files: 2 (sensitivity), 5 (HH win rates), 7 (cost and training curves)."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation import benchmark_of, metric_label
from rmipo.fingerprints import json_fingerprint
from rmipo.plots import GREY, draw_costs, draw_curves, footnotes, house_style, method_color, panel_letter, panels
from rmipo.record import read_metrics
from rmipo.reporting import results as saved
from rmipo.reporting.render import interval_text
from rmipo.reporting.results import OURS, RECIPES, ReportError, Result, RunFolder, method_label, model_label
from rmipo.reporting.tables import paired_difference

FIGURE5_METHODS = ("dpo", "simpo", "simper", "rmipo")
HH_SUBSETS = ("hh_helpful", "hh_harmless")
HH = {"hh_helpful": "Helpful", "hh_harmless": "Harmless", "hh_average": "Average"}
FIGURE7_METHODS = ("dpo", "beta-dpo", "epsilon-dpo", "alpha-dpo", "simpo", "simper", "rmipo")


@house_style
def figure2(outputs: Path, model: str, metric: str = "mt_bench", name: str = "") -> Figure:
    """`metric` over DPO's beta, SimPO's beta at gamma 1.0, and SimPO's gamma at beta 2.0; dashed: before training.

    A line joins runs that differ in one hyperparameter; of runs that differ in the seed alone it shows the mean, with a
    bar from the lowest to the highest; of single ones the standard error.
    `metric` is one of an evaluation (mt_bench, ...) or the last value of a logged one (eval_common/acc_avg_logp, ...);
    `name` is the evaluations' EVAL_NAME.
    """
    benchmark = benchmark_of(metric)
    start = saved.load_result(outputs, model, "initial", benchmark.name, name) if benchmark else None
    dpo, simpo = (measured(outputs, model, method, metric, name) for method in ("dpo", "simpo"))
    evaluations = [result for result in (*dpo["result"], *simpo["result"], start) if result]
    # The judge must not change along a line, nor between a line and its start.
    saved.require_comparable("figure 2", evaluations)
    # The paper varies one at a time, the other at its default.
    panel_runs = [
        ("DPO, varying $\\beta$", "dpo", "beta", dpo),
        ("SimPO, varying $\\beta$ ($\\gamma=1.0$)", "simpo", "beta", simpo[simpo["gamma"] == 1.0]),
        ("SimPO, varying $\\gamma$ ($\\beta=2.0$)", "simpo", "gamma", simpo[simpo["beta"] == 2.0]),
    ]
    figure, axes = panels(len(panel_runs), sharey=True)
    for axis, letter, (title, method, key, points) in zip(axes, "abc", panel_runs, strict=True):
        lines = lines_over(key, points)
        if not lines:
            remedy = f"`make sweep MODEL={model} METHOD={method}`"
            if benchmark:
                remedy += (
                    f", then `{saved.eval_command(model, f'sweep-{method}/<point>', benchmark.name, name)}` for each"
                )
            raise ReportError(f"figure 2 needs {method} runs with {metric} that differ in {key} alone: run {remedy}")
        draw_lines(axis, key, lines, method_color(method))
        if start is not None and metric in start.metrics:
            axis.axhline(start.metrics[metric], color=GREY, linestyle="--", linewidth=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "bottom", "fontsize": 7}
            axis.text(0.02, start.metrics[metric], "before training", color=GREY, **place)
        axis.set_xlabel(f"$\\{key}$")
        panel_letter(axis, letter, title)
    axes[0].set_ylabel(metric_label(metric))
    bars = "Bars: lowest and highest of several runs, of a single one ± 1 standard error of the evaluation."
    footnotes(figure, [bars, *saved.figure_notes(evaluations)])
    return figure


def measured(outputs: Path, model: str, method: str, metric: str, name: str = "") -> pd.DataFrame:
    """A line for each finished run of `method` with the metric: run, beta, gamma, value, error, result (None: logged)."""
    found, benchmark = [], benchmark_of(metric)
    # Whatever a folder is called, the hyperparameters are those in its run.json.
    for path in sorted((outputs / model).rglob("run.json")):
        folder = path.parent.relative_to(outputs / model).as_posix()
        run = saved.load_run(outputs, model, folder)
        if run.objective.get("name") != method or not run.finished:
            continue
        result = saved.load_result(outputs, model, folder, benchmark.name, name) if benchmark else None
        rows = read_metrics(run.folder) if benchmark is None else [result.metrics] if result else []
        if values := [row[metric] for row in rows if metric in row]:
            error = rows[-1].get(f"{metric}_standard_error", 0.0)
            own = {key: run.objective.get(key) for key in ("beta", "gamma")}
            found.append({"run": run, **own, "value": values[-1], "error": error, "result": result})
    return pd.DataFrame(found, columns=["run", "beta", "gamma", "value", "error", "result"])


def lines_over(key: str, points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A line for each combination of everything but `key`, with two values of it or more: label -> its points by `key`."""
    objectives = [{name: value for name, value in run.objective.items() if name != key} for run in points["run"]]
    fixed = [run.experiment() | {"objective": own} for run, own in zip(points["run"], objectives, strict=True)]
    groups = points.assign(fixed=fixed).groupby(list(map(json_fingerprint, fixed)), sort=False) if fixed else ()
    # One value alone is no line, and says nothing of the hyperparameter.
    lines = [(own["fixed"].iloc[0], own) for _, own in groups if own[key].nunique() > 1]
    names = dict.fromkeys(name for settings, _ in lines for name in settings)
    varying = [name for name in names if len({str(settings.get(name)) for settings, _ in lines}) > 1]
    lines.sort(key=lambda line: line[0]["learning_rate"])
    return {", ".join(f"{name} {settings.get(name, 'default')}" for name in varying): own for settings, own in lines}


def draw_lines(axis: Axes, key: str, lines: dict[str, pd.DataFrame], color: str) -> None:
    """The means, and a bar where repetitions or a standard error give one."""
    xs = sorted(set(pd.concat(lines.values())[key]))  # evenly spaced: the grids fit no one scale
    for number, ((label, line), marker) in enumerate(zip(lines.items(), "osD^v<>" * len(lines), strict=False), 1):
        style = {"color": color, "alpha": 0.4 + 0.6 * number / len(lines)}
        by_x = line.groupby(key)["value"]
        axis.plot([xs.index(x) for x in by_x.groups], by_x.mean(), marker=marker, markersize=4.5, label=label, **style)
        for x, points in line.groupby(key):
            reach = points["error"].iloc[0] if len(points) == 1 else 0.0
            axis.vlines(xs.index(x), points["value"].min() - reach, points["value"].max() + reach, linewidth=1, **style)
    if len(lines) > 1:
        axis.legend()
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.margins(x=0.08)


@house_style
def figure5(outputs: Path, model: str) -> Figure:
    """HH win rates (share of test pairs with A(w) > A(l)) by method; black lines: the paper's averages."""
    # As in the paper each subset is judged by the model trained on it, where any of those was evaluated. Otherwise <model>
    # itself judges both, for every method, and the paper has no number to stand beside.
    on_hh = hh_results(outputs, {metric: f"{model}-{metric.replace('_', '-')}" for metric in HH_SUBSETS})
    results = on_hh or hh_results(outputs, dict.fromkeys(HH_SUBSETS, model))
    if not results:
        own = f"{model}-hh-helpful" if (RECIPES / f"{model}-hh-helpful").is_dir() else model
        commands = f"`{saved.train_command(own, 'rmipo')}`, then `{saved.eval_command(own, 'rmipo', 'hh')}`"
        raise ReportError(f"figure 5 has no HH results of {model}: run {commands}, the same for other methods")
    shown = [result for found in results.values() for result in found.values()]
    # A bar of another judge of pairs, or of other pairs, would look like a better method.
    saved.require_comparable("figure 5", shown)
    printed = saved.paper_table("figure5").query("setting == @model").set_index("method")["average_win_rate"]
    printed = printed if on_hh else {}

    figure, (axis,) = panels(1, height=3.0)
    width = 0.8 / len(results)
    for index, (method, found) in enumerate(results.items()):
        rates = hh_rates(found)
        positions = [list(HH).index(name) + (index - (len(results) - 1) / 2) * width for name in rates]
        values, errors = zip(*rates.values(), strict=True)
        style = {"color": method_color(method), "error_kw": {"elinewidth": 0.8, "capsize": 1.5}}
        axis.bar(positions, values, 0.92 * width, yerr=errors, label=method_label(method), **style)
        if method in printed and "hh_average" in rates:
            ends = positions[-1] - 0.46 * width, positions[-1] + 0.46 * width
            axis.hlines(printed[method], *ends, color="black", linewidth=1.6, zorder=3)
        # At the foot of the bar: at its top the paper's line or another bar's error would be read with it.
        for x, value in zip(positions, values, strict=True):
            axis.text(x, 1, f"{value:.1f}", ha="center", fontsize=6.5, color="white", fontweight="bold")
    if len(printed):
        axis.plot([], [], color="black", linewidth=1.6, label="the paper's average")
    axis.axhline(50, color=GREY, linewidth=0.8, linestyle="--", label="chance")
    axis.set(ylim=(0, None), ylabel="Win rate (%)")  # a bar's length is its value
    axis.margins(y=0.08)
    axis.set_xticks(range(len(HH)), list(HH.values()))
    axis.grid(axis="x", visible=False)
    trained = "trained on the HH subset (average: one model each)" if on_hh else "not trained on HH"
    axis.set_title(f"{model_label(model)}, {trained}{on_other_pairs(shown)}", loc="left")
    figure.legend(ncols=len(results) + 2, loc="outside upper center")
    bars = "Bars: 95% interval over pairs (1.96 standard errors)."
    footnotes(figure, [bars, *paired_notes(results), *saved.figure_notes(shown)])
    return figure


def hh_results(outputs: Path, models: dict[str, str]) -> dict[str, dict[str, Result]]:
    """Method -> metric -> its result. `models`: the one that judges each metric's subset."""
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for method, (metric, model) in itertools.product(FIGURE5_METHODS, models.items()):
        result = saved.load_result(outputs, model, method, "hh")
        if result is not None and metric in result.metrics:
            found[method][metric] = result
    return found


def on_other_pairs(results: list[Result]) -> str:
    """For a title: which pairs were scored in place of Anthropic's."""
    other = sorted({path for result in results for path in result.settings.get("other_pairs") or []})
    return f"; not Anthropic's pairs: {', '.join(other)}" if other else ""


def paired_notes(results: dict[str, dict[str, Result]]) -> list[str]:
    """RMiPO minus the other methods of figure 5, pair by pair."""
    texts = []
    for method, (metric, ours) in itertools.product(results, results.get(OURS, {}).items()):
        theirs = results[method].get(metric)
        if method != OURS and theirs and (found := paired_difference([ours], [theirs], metric)):
            texts.append(f"{method_label(method)}, {metric_label(metric)}: {interval_text(found, 1)}")
    return [f"RMiPO minus each method on the same pairs: {'; '.join(texts)}."] if texts else []


def hh_rates(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """hh_helpful, hh_harmless and, with both, hh_average: (percent, half of its 95% interval)."""
    found = {name: result.metrics for name, result in results.items()}
    rates = {name: (own[name], 1.96 * own.get(f"{name}_standard_error", 0.0)) for name, own in found.items()}
    if len(rates) == 2:  # an average of one subset would be another number
        (first, error1), (second, error2) = rates.values()
        # The subsets' pairs are independent, also where one model scored both.
        rates["hh_average"] = (first + second) / 2, (error1**2 + error2**2) ** 0.5 / 2
    return rates


@house_style
def figure7(outputs: Path, model: str) -> Figure:
    """Hours and peak memory of finished runs; margin and win rate over training, in units common to all methods."""
    runs = {method: saved.load_run(outputs, model, method) for method in FIGURE7_METHODS}
    runs = {method: run for method, run in runs.items() if run is not None and run.finished}
    if not runs:
        raise ReportError(f"figure 7 has no finished runs of {model}: run `{saved.train_command(model, 'rmipo')}`")
    figure, (cost, margin, accuracy) = panels(3, height=3.1, width_ratios=(1.15, 1, 1))
    keys, memory, curves = ["common/margin_avg_logp", "common/acc_avg_logp"], [], []
    for method, run in runs.items():
        log = pd.DataFrame(read_metrics(run.folder))
        memory.append(f"{log['peak_memory_gib'].max():.1f} GiB")
        values = log.dropna(subset=keys).set_index("step")[keys]
        # A twentieth of the run: batches of few pairs jump by more than methods differ.
        smoothed = values.rolling(max(1, len(values) // 20), min_periods=1).mean()
        curves.append(smoothed.assign(method=method).reset_index())
    draw_hours(cost, runs, memory, model)
    for axis, key in zip((margin, accuracy), keys, strict=True):
        draw_curves(axis, pd.concat(curves), key, method_label)
    margin.set_ylabel("$A(y_w|x)-A(y_l|x)$\n(nats per token)")
    accuracy.set_ylabel("Pairs with $A(y_w|x)>A(y_l|x)$")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel_letter(margin, "b", "Margin")
    panel_letter(accuracy, "c", "Win rate")
    handles, labels = margin.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    # Hours of different hardware or versions are no comparison.
    made: dict[str, list[str]] = defaultdict(list)
    for method, run in runs.items():
        versions = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
        made[f"{hardware_of(run)}; {versions}"].append(method_label(method))
    footnotes(figure, [f"{model_label(model)}, {', '.join(methods)}: {way}." for way, methods in made.items()])
    return figure


def hardware_of(run: RunFolder) -> str:
    """E.g. "4 x NVIDIA A800-SXM4-80GB"."""
    devices = Counter(run.record.get("hardware", ["unknown hardware"]))
    return ", ".join(f"{count} x {name}" for name, count in devices.items())


def draw_hours(axis: Axes, runs: dict[str, RunFolder], memory: list[str], model: str) -> None:
    """Bars of a run's hours, start to saved model, with peak memory on them; open diamonds: the paper's hours."""
    printed = saved.paper_table("efficiency").set_index("method")["hours"] if model in saved.PAPER_MODELS else {}
    for place, (method, run) in enumerate(runs.items()):
        # The paper's are of four A800: of other hardware they are no comparison.
        if method in printed and hardware_of(run).startswith("4 x NVIDIA A800"):
            axis.plot(printed[method], place, "D", markersize=4, mfc="white", mec="black", mew=0.8)
    names = [method_label(method) + "*" * (run.record["starts"] > 1) for method, run in runs.items()]
    xlabel = "Hours of the run" + r" ($\diamond$: paper)" * bool(axis.lines)
    xlabel += "\n*: since its last start" * any(name.endswith("*") for name in names)
    hours = {method: run.record["seconds"] / 3600 for method, run in runs.items()}
    draw_costs(axis, hours, memory, names, xlabel)
