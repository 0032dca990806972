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
BESIDE = {  # the metric that a table shows beside the one that selects; all others are in the CSV
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
their task and satisfy every constraint of their prompt. Cut: share that the length limit ended. KL: log pi(y|x) minus that of
the initial model, mean over sampled answers. lr: learning rate. s/step: on a CPU seconds of one core, on a GPU by the clock;
a reference's scoring included. Mean γ: over the pairs trained.

Mean ± standard deviation over seeds. Δ: the method minus RMiPO, paired by seed and, where answers were sampled, by prompt; in
brackets its 95% bootstrap interval over both. p: by flipping the signs of whole seeds, shown from six seeds on, corrected by
Holm except for a contrast that was named beforehand. Could see: the difference that four of five studies of this size find."""


def beside(metric: str) -> str:
    """The metric that a table of `metric` shows too."""
    return BESIDE.get(metric, "constraints_cut")


def label(method: str) -> str:
    if method.endswith(AT_KL):
        return f"{label(method.removesuffix(AT_KL))} at RMiPO's KL"
    return LABELS.get(method, method_label(method))


def runs_of(lines: list[dict]) -> pd.DataFrame:
    """A row per run: what it is, its metrics and costs, NaN without one; `diverged`: a run without a result."""
    rows = [
        {name: line.get(name) for name in (*RUN, *BY_RUN)}
        | {name: line["metrics"].get(name) for name in METRICS}
        | {"diverged": "diverged" in line["metrics"]}
        for line in lines
    ]
    # A column of nothing but None would have no mean.
    return pd.DataFrame(rows).astype(dict.fromkeys((*METRICS, *BY_RUN), float))


def summarize(lines: list[dict], metric: str, primary: str | None = None) -> pd.DataFrame:
    """A row per noise and method: `<name>` and `<name>_std` of each metric and cost over the seeds.

    `difference` is of `metric` minus RMiPO's, with its 95% interval `difference_low` to `difference_high`, its `p` and the
    difference that the study `could_see`. `diverged` counts the runs without a result. `primary`: the method whose contrast was
    named beforehand.
    """
    runs = runs_of(lines)
    groups = runs.groupby(["noise", "method"], sort=False)
    rows = groups.agg(learning_rate=("learning_rate", "first"), seeds=("seed", "size"), diverged=("diverged", "sum"))
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
    # A seed has its own pairs and order, which all methods share: a difference within it is not due to them.
    theirs, ours = (
        {line["seed"]: line for line in lines if (line["noise"], line["method"]) == (noise, name)}
        for name in (method, OURS)
    )
    both = [seed for seed in theirs if not {"diverged"} & {*theirs[seed]["metrics"], *ours[seed]["metrics"]}]
    return contrast(*(scores({seed: runs[seed] for seed in both}, metric) for runs in (theirs, ours)))


def scores(lines: dict[int, dict], metric: str) -> list[list[float]]:
    """(seeds, prompts) of an arm; one column where the metric isn't known per prompt. A run that diverged scores 0."""
    by_seed = [line["metrics"] for _, line in sorted(lines.items())]
    if all(metric in metrics.get("per_prompt", {}) for metrics in by_seed):
        return [metrics["per_prompt"][metric] for metrics in by_seed]
    return [[metrics.get(metric, 0.0)] for metrics in by_seed]


def tables(rows: pd.DataFrame, rates: list[float], metric: str) -> list[str]:
    """Markdown: a title and a table for each noise, the best method first."""
    parts = []
    for noise, here in rows.groupby("noise", sort=False):
        # Equal ones keep the order in which methods are listed.
        here = here.sort_values(metric, ascending=False, kind="stable")
        parts += [f"Label noise {noise:.0%}, {here['seeds'].max()} seeds:", table(here, rates, metric)]
    return parts


def report(rows: pd.DataFrame, lines: list[dict], searched: list[dict], metric: str) -> str:
    """Markdown: the tables, the search (`searched`: its lines), and what numbers are."""
    rates = sorted({line["learning_rate"] for line in searched})
    chosen = f"Search: {METRICS[metric]} at each learning rate, on other held-out prompts. * marks an end of the range."
    parts = [*tables(rows, rates, metric), chosen, search_table(searched, metric), UNITS, made_with(lines)]
    return "\n\n".join(parts)


def made_with(lines: list[dict]) -> str:
    """Commit, versions and hardware of the runs; all that there are where they differ."""
    facts = [
        [str(line["commit"]) for line in lines],
        [", ".join(f"{name} {version}" for name, version in line["versions"].items()) for line in lines],
        [", ".join(line["hardware"]) for line in lines],
    ]
    return f"Commit {'; '.join(' and '.join(sorted(set(texts))) for texts in facts)}."


def table(rows: pd.DataFrame, rates: list[float], metric: str) -> str:
    """Without the columns in which nothing would stand. `rates`: those of a search, whose ends are marked."""
    other, cells = beside(metric), []
    for row in rows.to_dict("records"):
        rate, low, high = row["learning_rate"], row["difference_low"], row["difference_high"]
        compared = row["method"] != OURS and not np.isnan(low)
        behind, *bounds = (f"{value:+z.{digits(metric)}f}" for value in (row["difference"], low, high))
        behind += f" [{', '.join(bounds)}]" if low < high else ""  # one seed alone has no interval
        flips = 2 / 2 ** row["seeds"] < 0.05  # with fewer seeds no p could be small
        line = {
            "method": label(row["method"]),
            "lr": "" if pd.isna(rate) else f"{rate:g}" + "*" * (rate in (*rates[:1], *rates[-1:])),
            METRICS[metric]: number(row, metric),
            f"Δ {METRICS[metric]}": behind if compared else "",
            "p": f"{row['p']:.3f}" if compared and flips else "",
            "could see": f"{row['could_see']:.{digits(metric)}f}" if compared else "",
        }
        columns = {METRICS[other]: other, "mean γ": "gamma_mean", "s/step": "seconds_per_step"}
        cells.append(line | {head: number(row, name) for head, name in columns.items()})
    heads = [head for head in cells[0] if any(line[head] for line in cells)]
    return markdown_table([heads, *([line[head] for head in heads] for line in cells)])


def search_table(searched: list[dict], metric: str) -> str:
    """How much each method's result depends on its learning rate, and on hyperparameters that were searched too."""
    rates, rows = sorted({line["learning_rate"] for line in searched}), {}
    for line in searched:
        own = ", ".join(f"{name} {value:g}" for name, value in line["objective"])
        row = rows.setdefault(f"{label(line['method'])}{own and f' ({own})'}", dict.fromkeys(rates, ""))
        value = line["metrics"].get(metric)
        row[line["learning_rate"]] = "diverged" if value is None else f"{value:.{digits(metric)}f}"
    return markdown_table(
        [["method", *(f"{rate:g}" for rate in rates)], *([name, *row.values()] for name, row in rows.items())]
    )


def digits(metric: str) -> int:
    # Percentages and nats per answer are above ten, shares and numbers per token are below one.
    return 1 if METRICS.get(metric, "").endswith(("(%)", "(nats)")) else 3


def number(row: dict, name: str) -> str:
    if np.isnan(row[name]):
        return "diverged" if row["diverged"] else ""
    text = f"{row[name]:z.{digits(name)}f}"
    return text if np.isnan(row[f"{name}_std"]) else f"{text} ± {row[f'{name}_std']:.{digits(name)}f}"


def write(folder: Path, text: str, rows: pd.DataFrame, lines: list[dict]) -> list[Path]:
    """table.md, table.csv (a row per noise and method), curves.csv (a row per run and step), compare.png and .pdf."""
    files = [folder / name for name in ("table.md", "table.csv", "curves.csv")]
    files[0].write_text(text + "\n")
    rows.to_csv(files[1], index=False)
    points = pd.DataFrame([{**{key: line[key] for key in RUN}, **point} for line in lines for point in line["curve"]])
    points.to_csv(files[2], index=False)
    return [*files, *save(draw(rows, points, runs_of(lines)), folder / "compare")]


@house_style
def draw(rows: pd.DataFrame, points: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Cost, margin and win rate as in Figure 7 (at the lowest noise), and where answers are known, P(right).

    Where answers were sampled, reward and repetition against KL take the place of the win rate and P(right).
    """
    noise = rows["noise"].min()  # the other noises are in panel d and in the CSV
    figure, axes = panels(2, height=2.9, rows=2)
    timed = rows[rows["noise"] == noise].dropna(subset="seconds_per_step").set_index("method")
    # Runs that diverged have no time, and no bar.
    memory = [f"{mib:.0f} MiB" for mib in timed["peak_memory_mib"]]
    draw_costs(axes[0], timed["seconds_per_step"].to_dict(), memory, list(map(label, timed.index)), "seconds per step")
    points = points[points["noise"] == noise]
    draw_curves(axes[1], points, "preference_margin", label)
    axes[1].set_ylabel("$A(y_w|x)-A(y_l|x)$, held out (nats per token)")
    panel_letter(axes[1], "b", f"Margin, label noise {noise:.0%}")
    if rows["kl_initial"].notna().any():
        draw_against_kl(axes[2], rows, "repetition", "Repeated 4-grams (%)")
        draw_against_kl(axes[3], rows, "constraints_solved", "Solved tasks (%)")
        panel_letter(axes[2], "c", "Repetition against KL")
        panel_letter(axes[3], "d", "Reward against KL")
    else:
        draw_curves(axes[2], points, "preference_accuracy", label)
        axes[2].set_ylabel("Held-out pairs with $A(y_w|x)>A(y_l|x)$")
        axes[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel_letter(axes[2], "c", f"Win rate, label noise {noise:.0%}")
        if runs["right_probability"].notna().any():
            draw_answers(axes[3], runs)
        else:
            axes[3].set_axis_off()
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=6, loc="outside lower center")
    return figure


def draw_against_kl(axis: Axes, rows: pd.DataFrame, metric: str, ylabel: str) -> None:
    """A metric against the distance from the initial model, with the standard deviation over seeds."""
    rows = rows.dropna(subset=metric).sort_values(metric)
    for place, row in enumerate(rows.to_dict("records")):
        error = {"xerr": row["kl_initial_std"], "yerr": row[f"{metric}_std"], "elinewidth": 0.8}
        at, color = (row["kl_initial"], row[metric]), method_color(row["method"])
        axis.errorbar(*at, fmt="o", markersize=4, color=color, **error)
        # In a column beside the panel, in the order of the points: beside the points, names would lie on each other.
        beside = (1.06, (place + 0.5) / len(rows))
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.7}
        text = {"textcoords": "axes fraction", "va": "center", "fontsize": 6.5, "color": color}
        axis.annotate(label(row["method"]), at, beside, arrowprops=line, **text)
    axis.margins(x=0.1, y=0.15)
    axis.set_xlabel("KL to the initial model (nats per answer)")
    axis.set_ylabel(ylabel)


def draw_answers(axis: Axes, runs: pd.DataFrame) -> None:
    """P(right) of every seed: a dot each, means as bars, the noises one above the other."""
    runs = runs.dropna(subset="right_probability")
    methods, noises = runs["method"].unique().tolist(), sorted(runs["noise"].unique())
    for (method, noise), values in runs.groupby(["method", "noise"])["right_probability"]:
        height = methods.index(method) + 0.36 * (noises.index(noise) - (len(noises) - 1) / 2)
        color = method_color(method)
        filled = color if noise == noises[0] else "white"
        axis.plot(values, [height] * len(values), "o", markersize=3.5, mec=color, mfc=filled)
        axis.vlines(values.mean(), height - 0.16, height + 0.16, color=color, linewidth=1.4)
    axis.set_yticks(range(len(methods)), map(label, methods))
    axis.invert_yaxis()
    axis.set_xlabel(f"P(right); filled: noise {noises[0]:.0%}" + "".join(f", open: {x:.0%}" for x in noises[1:]))
    panel_letter(axis, "d", "Exact probability of right answers")
