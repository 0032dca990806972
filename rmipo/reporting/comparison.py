"""The result of `make compare`: a table per label noise, what it says about RMiPO, CSV files, curves like Figure 7."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation.statistics import bootstrap
from rmipo.plots import house_style, method_color, panel_letter, panels, save
from rmipo.reporting.render import markdown_table
from rmipo.reporting.results import OURS, method_label

METRICS = {
    "right_probability": "P(right)",
    "right": "right",
    "boilerplate": "boilerplate",
    "wrong": "wrong",
    "garbled": "garbled",
    "preference_accuracy": "accuracy",
    "preference_margin": "margin",
    "constraints_all": "all constraints (%)",
    "constraints_each": "constraints (%)",
    "specificity": "own prompt most likely (%)",
    "pmi_token": "PMI (nats/token)",
    "kl_initial": "KL to the start (nats)",
    "tokens": "tokens",
    "repetition": "repeated 4-grams (%)",
}
BESIDE = {  # the metric that a table shows beside the one that selects; all others are in the CSV
    "right_probability": "preference_accuracy",
    "constraints_all": "kl_initial",
    "preference_accuracy": "preference_margin",
}
COSTS = {"seconds_per_step": "s/step", "peak_memory_mib": "MiB"}
LABELS = {"initial": "initial model", "sft-chosen": "SFT on chosen"}
UNITS = """\
P(right): exact total probability of the right answers, mean over the held-out questions. Accuracy, margin: held-out pairs
with A(chosen) > A(rejected), and the mean difference, A in nats per token. All constraints: share of sampled answers that
satisfy every constraint of their prompt. s/step: on a CPU seconds of one core, on a GPU by the clock; a reference's scoring
included. Mean ± standard deviation over seeds. Δ is paired by seed; in brackets, where answers were sampled, its 95%
bootstrap interval over prompts. table.csv has all metrics and the peak memory."""


def label(method: str) -> str:
    return LABELS.get(method, method_label(method))


def summarize(lines: list[dict], metric: str) -> list[dict]:
    """One row per noise and method: `<name>` and `<name>_std` of each metric and cost over the seeds.

    `difference` and `difference_std` are of `metric` minus RMiPO's of the same seed, `wins` in how many seeds that is
    positive. `diverged` counts the runs without a result.
    """
    groups: dict[tuple[float, str], dict[int, dict]] = {}
    for line in lines:
        groups.setdefault((line["noise"], line["method"]), {})[line["seed"]] = line
    rows = []
    for (noise, method), by_seed in groups.items():
        finished = {seed: line for seed, line in by_seed.items() if "diverged" not in line["metrics"]}
        row = {"noise": noise, "method": method, "learning_rate": next(iter(by_seed.values()))["learning_rate"]}
        row |= {"seeds": len(by_seed), "diverged": len(by_seed) - len(finished)}
        for name in METRICS:
            row |= spread(name, [line["metrics"][name] for line in finished.values() if name in line["metrics"]])
        for name in COSTS:
            row |= spread(name, [line[name] for line in finished.values() if line[name] is not None])
        ours = groups[noise, OURS]
        pairs = [(line["metrics"].get(metric), ours[seed]["metrics"].get(metric)) for seed, line in finished.items()]
        differences = [theirs - mine for theirs, mine in pairs if mine is not None]
        row |= spread("difference", differences) | {"wins": sum(value > 0 for value in differences)}
        row |= interval([(line, ours[seed]) for seed, line in finished.items()], metric)
        rows.append(row)
    return rows


def interval(pairs: list[tuple[dict, dict]], metric: str) -> dict:
    """95% interval of the metric's difference over prompts, from (theirs, ours) per seed; None where prompts aren't known."""
    answers = [[line["metrics"].get("per_prompt", {}).get(metric) for line in pair] for pair in pairs]
    if not answers or None in [part for pair in answers for part in pair]:
        return {"difference_low": None, "difference_high": None}
    found = bootstrap(np.mean([np.subtract(theirs, ours) for theirs, ours in answers], axis=0))
    return {"difference_low": found.low, "difference_high": found.high}


def spread(name: str, values: list[float]) -> dict:
    """Mean, and standard deviation where there are two values or more; None without any."""
    return {name: mean(values) if values else None, f"{name}_std": stdev(values) if len(values) > 1 else None}


def report(rows: list[dict], lines: list[dict], searched: list[dict], metric: str) -> str:
    """Markdown: a table per noise, the methods before RMiPO, the search (`searched`: its lines), and what numbers are."""
    rates = sorted({line["learning_rate"] for line in searched})
    parts = []
    for noise in dict.fromkeys(row["noise"] for row in rows):
        here = sorted((row for row in rows if row["noise"] == noise), key=lambda row: -(row[metric] or 0))
        parts += [f"Label noise {noise:.0%}", table(here, rates, metric), findings(here, metric)]
    chosen = f"Search: {METRICS[metric]} at each learning rate, on other held-out prompts. * marks an end of the range."
    return "\n\n".join([*parts, chosen, search_table(searched, rates, metric), UNITS, made_with(lines)])


def made_with(lines: list[dict]) -> str:
    """Commit, versions and hardware of the runs; all that there are where they differ."""

    def listing(values: Iterable[str]) -> str:
        return " and ".join(sorted(set(values)))

    commits = listing(str(line["commit"]) for line in lines)
    versions = listing(", ".join(f"{name} {version}" for name, version in line["versions"].items()) for line in lines)
    return f"Commit {commits}; {versions}; {listing(', '.join(line['hardware']) for line in lines)}."


def table(rows: list[dict], rates: list[float], metric: str) -> str:
    beside = BESIDE[metric]
    lines = [["method", "lr", METRICS[metric], f"Δ {METRICS[metric]}", METRICS[beside], COSTS["seconds_per_step"]]]
    for row in rows:
        rate = row["learning_rate"]
        edge = "*" * (rate in (min(rates), max(rates)))
        difference = "" if row["method"] == OURS else number(row, "difference", signed=True)
        if difference and row["difference_low"] is not None:
            difference = f"{row['difference']:+z.1f} [{row['difference_low']:+z.1f}, {row['difference_high']:+z.1f}]"
        cells = [number(row, metric), difference, number(row, beside), number(row, "seconds_per_step")]
        lines.append([label(row["method"]), "" if rate is None else f"{rate:g}{edge}", *cells])
    return markdown_table(lines)


def search_table(searched: list[dict], rates: list[float], metric: str) -> str:
    """How much each method's result depends on its learning rate."""
    lines = [["method", *(f"{rate:g}" for rate in rates)]]
    for method, group in by_method(searched):
        values = {line["learning_rate"]: line["metrics"].get(metric) for line in group}
        texts = ["diverged" if values[rate] is None else f"{values[rate]:.{digits(metric)}f}" for rate in rates]
        lines.append([label(method), *texts])
    return markdown_table(lines)


def digits(metric: str) -> int:
    # Percent and nats per answer are tens; shares and nats per token are below one.
    return 1 if METRICS.get(metric, "").endswith(("(%)", "(nats)")) else 3


def number(row: dict, name: str, signed: bool = False) -> str:
    if row[name] is None:
        return "diverged" if row["diverged"] else ""
    text = f"{row[name]:{'+' if signed else ''}z.{digits(name)}f}"
    return text if row[f"{name}_std"] is None else f"{text} ± {row[f'{name}_std']:.{digits(name)}f}"


def findings(rows: list[dict], metric: str) -> str:
    """Which methods are ahead of RMiPO by `metric`, in how many seeds, and which differences their intervals don't show.

    `rows`: those of one noise, best first.
    """
    ours = next(row for row in rows if row["method"] == OURS)
    if ours[metric] is None:
        return "RMiPO diverged."
    trained = [row for row in rows if row[metric] is not None and row["method"] != "initial"]
    place = f"RMiPO is number {trained.index(ours) + 1} of {len(trained)} by {METRICS[metric]}"
    ahead, behind = [], []  # behind: within noise
    for row in (row for row in trained if row is not ours):
        # Without sampled answers there is no interval over prompts: the seeds alone say who is ahead.
        within = row["difference_low"] is not None and row["difference_low"] <= 0 <= row["difference_high"]
        if row["difference"] > 0:
            ahead.append(f"{label(row['method'])} ({row['wins']} of {row['seeds']} seeds{', within noise' * within})")
        elif within:
            behind.append(label(row["method"]))
    text = f"{place}. Ahead of it: {', '.join(ahead)}." if ahead else f"{place}: none is ahead of it."
    return text + (f" Behind it within noise: {', '.join(behind)}." if behind else "")


def write(folder: Path, text: str, rows: list[dict], lines: list[dict]) -> list[Path]:
    """table.md, table.csv (a row per noise and method), curves.csv (a row per run and step), compare.png and .pdf."""
    files = [folder / name for name in ("table.md", "table.csv", "curves.csv")]
    files[0].write_text(text + "\n")
    pd.DataFrame(rows).to_csv(files[1], index=False)
    run = ("noise", "method", "seed", "learning_rate")
    points = [{**{key: line[key] for key in run}, **point} for line in lines for point in line["curve"]]
    pd.DataFrame(points).to_csv(files[2], index=False)
    return [*files, *save(draw(rows, lines), folder / "compare")]


@house_style
def draw(rows: list[dict], lines: list[dict]) -> Figure:
    """Cost, margin and win rate as in Figure 7 (at the lowest noise), and where answers are known, P(right).

    Where answers were sampled, reward and repetition against KL take the place of the win rate and P(right).
    """
    noises = sorted({row["noise"] for row in rows})
    here = [row for row in rows if row["noise"] == noises[0] and row["method"] != "initial"]
    known = any(row["right_probability"] is not None for row in rows)
    figure, axes = panels(2, height=2.9, rows=2)
    draw_cost(axes[0], here)
    curves = [line for line in lines if line["noise"] == noises[0] and line["curve"]]
    draw_curves(axes[1], curves, "preference_margin")
    axes[1].set_ylabel("$A(y_w|x)-A(y_l|x)$, held out (nats per token)")
    panel_letter(axes[1], "b", f"Margin, label noise {noises[0]:.0%}")
    if any(row["kl_initial"] is not None for row in here):
        draw_against_kl(axes[2], rows, "repetition", "Repeated 4-grams (%)")
        draw_against_kl(axes[3], rows, "constraints_all", "Answers with all constraints (%)")
        panel_letter(axes[2], "c", "Repetition against KL")
        panel_letter(axes[3], "d", "Reward against KL")
    else:
        draw_curves(axes[2], curves, "preference_accuracy")
        axes[2].set_ylabel("Held-out pairs with $A(y_w|x)>A(y_l|x)$")
        axes[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel_letter(axes[2], "c", f"Win rate, label noise {noises[0]:.0%}")
        if known:
            draw_answers(axes[3], lines, noises)
        else:
            axes[3].set_axis_off()
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, loc="outside lower center")
    return figure


def draw_cost(axis: Axes, rows: list[dict]) -> None:
    rows = [row for row in rows if row["seconds_per_step"] is not None]
    seconds = [row["seconds_per_step"] for row in rows]
    axis.barh(range(len(rows)), seconds, 0.7, color=[method_color(row["method"]) for row in rows])
    for place, row in enumerate(rows):
        text = f"{row['peak_memory_mib']:.0f} MiB"
        axis.annotate(text, (seconds[place], place), (3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axis.set_yticks(range(len(rows)), [label(row["method"]) for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds per step")
    panel_letter(axis, "a", "Time and peak memory")


def draw_curves(axis: Axes, lines: list[dict], name: str) -> None:
    """Held-out curves: means over seeds, a line per method, with the range over seeds as a band; RMiPO with dots, on top."""
    for method, group in by_method(lines):
        steps = [point["step"] for point in group[0]["curve"]]
        values = np.array([[point[name] for point in line["curve"]] for line in group])
        ours = {"linewidth": 0.8, "marker": "o", "markersize": 3.5, "markeredgecolor": "black", "markeredgewidth": 0.5}
        style = {**ours, "zorder": 4} if method == OURS else {"linewidth": 1.0, "zorder": 3}
        axis.plot(steps, values.mean(axis=0), color=method_color(method), label=label(method), **style)
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=method_color(method), alpha=0.12, lw=0)
    axis.set_xlabel("Step")
    axis.margins(x=0.02)


def draw_against_kl(axis: Axes, rows: list[dict], metric: str, ylabel: str) -> None:
    """A metric against the distance from the initial model, with the standard deviation over seeds."""
    rows = sorted((row for row in rows if row[metric] is not None), key=lambda row: row[metric])
    for place, row in enumerate(rows):
        error = {"xerr": row["kl_initial_std"], "yerr": row[f"{metric}_std"], "elinewidth": 0.8}
        at, color = (row["kl_initial"], row[metric]), method_color(row["method"])
        axis.errorbar(*at, fmt="o", markersize=4, color=color, **error)
        # In a column beside the panel, in the order of the points: beside the points, names would lie on each other.
        beside = (1.06, (place + 0.5) / len(rows))
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.7}
        axis.annotate(label(row["method"]), at, beside, textcoords="axes fraction", va="center", fontsize=6.5, color=color,
                      arrowprops=line)  # fmt: skip
    axis.margins(x=0.1, y=0.15)
    axis.set_xlabel("KL to the initial model (nats per answer)")
    axis.set_ylabel(ylabel)


def draw_answers(axis: Axes, lines: list[dict], noises: list[float]) -> None:
    """P(right) of every seed: a dot each, means as bars, the noises one above the other."""
    lines = [line for line in lines if "right_probability" in line["metrics"]]
    groups = by_method(lines)
    for place, (method, group) in enumerate(groups):
        for number_, noise in enumerate(noises):
            values = [line["metrics"]["right_probability"] for line in group if line["noise"] == noise]
            height = place + 0.36 * (number_ - (len(noises) - 1) / 2)
            filled = method_color(method) if number_ == 0 else "white"
            axis.plot(values, [height] * len(values), "o", markersize=3.5, mec=method_color(method), mfc=filled)
            if values:
                axis.plot([mean(values)] * 2, [height - 0.16, height + 0.16], color=method_color(method), linewidth=1.4)
    axis.set_yticks(range(len(groups)), [label(method) for method, _ in groups])
    axis.invert_yaxis()
    axis.set_xlabel(f"P(right); filled: noise {noises[0]:.0%}" + "".join(f", open: {x:.0%}" for x in noises[1:]))
    panel_letter(axis, "d", "Exact probability of right answers")


def by_method(lines: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(line["method"], []).append(line)
    return list(groups.items())
