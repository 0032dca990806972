"""The results of `make compare` and `make margins`: a table per label noise, CSV files, curves like Figure 7."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rmipo.evaluation.statistics import Interval, contrast, holm
from rmipo.plots import draw_costs, draw_curves, house_style, method_color, panel_letter, panels, save
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
    "constraints_solved": "solved (%)",
    "constraints_answered": "task answered (%)",
    "constraints_all": "all constraints (%)",
    "constraints_cut": "cut (%)",
    "ranking_auc": "AUC by log pi(y|x) (%)",
    "ranking_pmi_auc": "AUC by PMI (%)",
    "specificity": "own prompt most likely (%)",
    "pmi_token": "PMI (nats/token)",
    "kl_initial": "KL to the start (nats)",
    "tokens": "tokens",
    "repetition": "repeated 4-grams (%)",
}
USUAL = "constraints_cut"
BESIDE = {  # the metric that a table shows beside its own, where it isn't the usual one; all others are in the CSV
    "right_probability": "preference_accuracy",
    "constraints_solved": "kl_initial",
    "preference_accuracy": "preference_margin",
}
RUN = ("noise", "method", "seed", "learning_rate")
BY_RUN = ("seconds_per_step", "peak_memory_mib", "gamma_mean")
MEAN_GAMMA = "simpo-mean-gamma"
AT_KL = "-at-kl"  # ends the name of a method that was trained about as far from the initial model as RMiPO
LABELS = {"initial": "initial model", "sft-chosen": "SFT on chosen", MEAN_GAMMA: "SimPO at RMiPO's mean γ"}
POWER = 2.8  # standard errors of a difference that is found at 5% in four of five studies: 1.96 + 0.84
UNITS = """\
P(right): exact total probability of the right answers, mean over the held-out questions. Accuracy, margin: held-out pairs
with A(chosen) > A(rejected), and the mean difference, A in nats per token. Solved: share of sampled answers that end, answer
their task and satisfy every constraint of their prompt. KL: log pi(y|x) minus that of the initial model, mean over sampled
answers. s/step: on a CPU seconds of one core, on a GPU by the clock; a reference's scoring included. Mean γ: over the pairs
trained. Mean ± standard deviation over seeds. Δ: the method minus RMiPO, paired by seed and, where answers were sampled, by
prompt; in brackets its 95% bootstrap interval over both. p: by flipping the signs of whole seeds, shown from six seeds on,
corrected by Holm except for a contrast that was named beforehand. Could see: what four of five studies of this size find."""


def label(method: str) -> str:
    if method.endswith(AT_KL):
        return f"{label(method.removesuffix(AT_KL))} at RMiPO's KL"
    return LABELS.get(method, method_label(method))


def summarize(lines: list[dict], metric: str, primary: str | None = None) -> pd.DataFrame:
    """A row per noise and method: `<name>` and `<name>_std` of each metric and cost over the seeds.

    `difference` is of `metric` minus RMiPO's, with its 95% interval `difference_low` to `difference_high`, its `p` and the
    difference that the study `could_see`. `diverged` counts the runs without a result. `primary`: the method whose contrast was
    named beforehand.
    """
    runs = pd.DataFrame([line | line["metrics"] for line in lines], columns=[*RUN, "diverged", *METRICS, *BY_RUN])
    # A column of nothing but None would have no mean.
    runs = runs.astype(dict.fromkeys((*METRICS, *BY_RUN), float))
    groups = runs.groupby(["noise", "method"], sort=False)
    rows = groups.agg(learning_rate=("learning_rate", "first"), seeds=("seed", "size"), diverged=("diverged", "count"))
    columns = {}
    for name in (*METRICS, *BY_RUN):
        columns |= {name: groups[name].mean(), f"{name}_std": groups[name].std()}
    found = pd.DataFrame([difference(lines, *group, metric) for group in rows.index], index=rows.index)
    columns |= {"difference": found["mean"], "difference_low": found["low"], "difference_high": found["high"]}
    rows = rows.assign(**columns, p=found["p"], could_see=POWER * found["standard_error"]).reset_index()
    for _, others in rows[~rows["method"].isin([OURS, primary])].groupby("noise"):
        rows.loc[others.index, "p"] = holm(others["p"])
    return rows


def difference(lines: list[dict], noise: float, method: str, metric: str) -> Interval:
    """The metric minus RMiPO's, paired by seed and, where answers were sampled, by prompt."""
    runs = [line for line in lines if line["noise"] == noise and "diverged" not in line["metrics"]]
    # A seed has its own pairs and order, which all methods share: a difference within it is not due to them.
    arms = [[line for line in runs if line["method"] == name] for name in (method, OURS)]
    theirs, ours = ({line["seed"]: line["metrics"] for line in arm} for arm in arms)
    both = sorted(theirs.keys() & ours.keys())
    return contrast(*(scores([metrics[seed] for seed in both], metric) for metrics in (theirs, ours)))


def scores(runs: list[dict], metric: str) -> list[list[float]]:
    """(seeds, prompts) of an arm's metrics; one column where the metric isn't known per prompt."""
    if all(metric in metrics.get("per_prompt", {}) for metrics in runs):
        return [metrics["per_prompt"][metric] for metrics in runs]
    return [[metrics.get(metric, np.nan)] for metrics in runs]


def report(tables: dict[str, pd.DataFrame], lines: list[dict], searched: list[dict], spread: str = "") -> str:
    """Markdown: of each metric in `tables`, from `summarize`, a table for each noise; the search; what numbers are.

    `searched`: the lines of the search, on other held-out prompts. `spread`: more Markdown, before it.
    """
    parts = []
    for metric, rows in tables.items():
        for noise, here in rows.groupby("noise", sort=False):
            # Equal ones keep the order in which methods are listed.
            here = here.sort_values(metric, ascending=False, kind="stable")
            parts += [f"Label noise {noise:.0%}, {here['seeds'].max()} seeds:", table(here, metric)]
    parts += [spread] if spread else []
    first = next(iter(tables))
    for metric in (first, BESIDE.get(first, USUAL)) if searched else ():
        parts += [f"Search, {METRICS[metric]} on other held-out prompts:", search_table(searched, metric)]
    return "\n\n".join([*parts, UNITS, made_with(lines)])


def made_with(lines: list[dict]) -> str:
    """Commit, versions and hardware of the runs; all that there are where they differ."""
    commits = {str(line["commit"]) for line in lines}
    versions = {", ".join(f"{name} {version}" for name, version in line["versions"].items()) for line in lines}
    hardware = {", ".join(line["hardware"]) for line in lines}
    return f"Commit {'; '.join(' and '.join(sorted(texts)) for texts in (commits, versions, hardware))}."


def table(rows: pd.DataFrame, metric: str) -> str:
    """Without the columns in which nothing would stand."""
    beside, cells = BESIDE.get(metric, USUAL), []
    columns = {METRICS[beside]: beside, "mean γ": "gamma_mean", "s/step": "seconds_per_step"}
    for row in rows.to_dict("records"):
        low, high = row["difference_low"], row["difference_high"]
        compared = row["method"] != OURS and not np.isnan(low)
        behind, *bounds = (f"{value:+z.{digits(metric)}f}" for value in (row["difference"], low, high))
        behind += f" [{', '.join(bounds)}]" if low < high else ""  # one seed alone has no interval
        flips = 2 / 2 ** row["seeds"] < 0.05  # with fewer seeds no p could be small
        line = {
            "method": label(row["method"]),
            "lr": "" if pd.isna(row["learning_rate"]) else f"{row['learning_rate']:g}",
            METRICS[metric]: number(row, metric),
            f"Δ {METRICS[metric]}": behind if compared else "",
            "p": f"{row['p']:.3f}" if compared and flips else "",
            "could see": f"{row['could_see']:.{digits(metric)}f}" if compared and low < high else "",
        }
        cells.append(line | {head: number(row, name) for head, name in columns.items()})
    heads = [head for head in cells[0] if any(line[head] for line in cells)]
    return markdown_table([heads, *([line[head] for head in heads] for line in cells)])


def search_table(searched: list[dict], metric: str) -> str:
    """How much each method's result depends on its learning rate, and on hyperparameters that were searched too."""
    rates, rows = sorted({line["learning_rate"] for line in searched}), {}
    for line in searched:
        own = ", ".join(f"{name} {value:g}" for name, value in line.get("objective", ()))  # lines of old logs have none
        row = rows.setdefault(f"{label(line['method'])}{own and f' ({own})'}", dict.fromkeys(rates, ""))
        value = line["metrics"].get(metric)
        row[line["learning_rate"]] = "diverged" if value is None else f"{value:.{digits(metric)}f}"
    cells = [[name, *row.values()] for name, row in rows.items()]
    return markdown_table([["method", *(f"{rate:g}" for rate in rates)], *cells])


def digits(metric: str) -> int:
    # Percentages and nats per answer are above ten, shares and numbers per token are below one.
    return 1 if METRICS.get(metric, "").endswith(("(%)", "(nats)")) else 3


def number(row: dict, name: str) -> str:
    if np.isnan(row[name]):
        return "diverged" if row["diverged"] else ""
    text = f"{row[name]:z.{digits(name)}f}"
    return text if np.isnan(row[f"{name}_std"]) else f"{text} ± {row[f'{name}_std']:.{digits(name)}f}"


def write(folder: Path, text: str, rows: pd.DataFrame, lines: list[dict], metric: str) -> list[Path]:
    """table.md, table.csv (a row per noise and method), curves.csv (a row per run and step), compare.png and .pdf."""
    points = pd.DataFrame([{**{key: line[key] for key in RUN}, **point} for line in lines for point in line["curve"]])
    (folder / "table.md").write_text(text + "\n")
    rows.to_csv(folder / "table.csv", index=False)
    points.to_csv(folder / "curves.csv", index=False)
    return [folder / "table.md", *save(draw(rows, points, metric), folder / "compare")]


@house_style
def draw(rows: pd.DataFrame, points: pd.DataFrame, metric: str) -> Figure:
    """Cost, margin and win rate as in Figure 7, at the lowest noise; `metric` at every noise."""
    noise = rows["noise"].min()
    figure, axes = panels(2, height=2.9, rows=2)
    timed = rows[rows["noise"] == noise].dropna(subset="seconds_per_step").set_index("method")
    # Runs that diverged have no time, and no bar.
    memory = [f"{mib:.0f} MiB" for mib in timed["peak_memory_mib"]]
    draw_costs(axes[0], timed["seconds_per_step"].to_dict(), memory, list(map(label, timed.index)), "seconds per step")
    points = points[points["noise"] == noise]
    draw_curves(axes[1], points, "preference_margin", label)
    axes[1].set_ylabel("$A(y_w|x)-A(y_l|x)$, held out (nats per token)")
    panel_letter(axes[1], "b", f"Margin, label noise {noise:.0%}")
    draw_curves(axes[2], points, "preference_accuracy", label)
    axes[2].set_ylabel("Held-out pairs with $A(y_w|x)>A(y_l|x)$")
    axes[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel_letter(axes[2], "c", f"Win rate, label noise {noise:.0%}")
    draw_outcomes(axes[3], rows.dropna(subset=metric), metric)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, loc="outside lower center")
    return figure


def draw_outcomes(axis: Axes, rows: pd.DataFrame, metric: str) -> None:
    """The mean over seeds with the standard deviation, the noises of a method one above the other."""
    methods, noises = rows["method"].unique().tolist(), sorted(rows["noise"].unique())
    for row in rows.to_dict("records"):
        height = methods.index(row["method"]) + 0.36 * (noises.index(row["noise"]) - (len(noises) - 1) / 2)
        color = method_color(row["method"])
        filled = color if row["noise"] == noises[0] else "white"
        axis.errorbar(row[metric], height, xerr=row[f"{metric}_std"], fmt="o", markersize=4, color=color, mfc=filled)
    axis.set_yticks(range(len(methods)), map(label, methods))
    axis.invert_yaxis()
    others = "".join(f", open: {noise:.0%}" for noise in noises[1:])
    axis.set_xlabel(f"{METRICS[metric]}; filled: noise {noises[0]:.0%}{others}")
    panel_letter(axis, "d", "Outcome, mean ± standard deviation")
