"""Figures of per-pair scores: 3 (two signals on HH), 6 (reward differences), 8 (the margin gamma).

Their arrays come from the HH evaluation's files, or from scoring a run's own preference data; then they are drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo.data.pairs import LIMITS, load_pairs
from rmipo.data.sources import load_sources, mix, mixture_entries
from rmipo.evaluation.pair_scores import native_rewards, score_model
from rmipo.fingerprints import has_weights, trained_fingerprint
from rmipo.objectives import PairScores, RMiPO, build_objective
from rmipo.objectives.rmipo import SCHEDULES, delta_pmi, pmi, scheduled_margin
from rmipo.page.look import sample
from rmipo.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    footnotes,
    house_style,
    method_color,
    panel_letter,
    panels,
)
from rmipo.recipe.schema import DataConfig, of_recipe
from rmipo.record import package_versions
from rmipo.reporting.results import ReportError, Result, RunFolder, eval_command, load_result, method_label

BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
AT_MAX = 1e-6
AT_MIN = 0.01  # gamma this close counts as at gamma_min: the exponential reaches it only in the limit


def hh_signals(outputs: Path, model: str, method: str) -> tuple[dict[str, dict[str, np.ndarray]], Result]:
    """Figure 3: subset -> log-likelihood and PMI differences in nats per token, from eval/hh_<subset>.pt; and the result
    that those belong to. Raises ReportError without any, and for scores of other weights than the folder holds now.
    """
    signals, folder = {}, outputs / model / method
    evaluation, command = load_result(outputs, model, method, "hh"), eval_command(model, method, "hh")
    for path in sorted((folder / "eval").glob("hh_*.pt"), reverse=True):  # helpful, harmless
        scores = torch.load(path, weights_only=True)
        # Density of a model that is gone, under the name of the new one.
        if has_weights(folder) and scores.get("fingerprint") != trained_fingerprint(folder):
            raise ReportError(f"{path} is of other weights than {folder} now: delete it and hh.json, run `{command}`")
        signals[path.stem.removeprefix("hh_")] = differences(scores)
    if not signals or evaluation is None:
        raise ReportError(f"figure 3 has no HH scores of {model} {method} in {folder}/eval: run `{command}`")
    return signals, evaluation


def differences(scores: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A(w) - A(l), and Delta_pmi (Eq. 7), (pairs,), in nats per token."""
    logps, priors, lengths = (
        [scores[name.format(side)] for side in ("chosen", "rejected")]
        for name in ("{}_logps", "prior_{}_logps", "{}_lengths")
    )
    chosen, rejected = map(pmi, logps, priors, lengths)
    loglik = logps[0] / lengths[0] - logps[1] / lengths[1]
    return {"loglik": loglik.numpy(), "pmi": delta_pmi(chosen, rejected).numpy()}


def run_scores(
    run: RunFolder, split: str, max_pairs: int, prior_context: str | None, header_in_response: bool = False
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Scores of a run's own pairs under its final policy, and their source rows: the pairs that `make look` draws."""
    pairs = sample(load_pairs(of_recipe(DataConfig, run.record["recipe"]), split), max_pairs)
    options = {"prior_context": prior_context, "header_in_response": header_in_response, **scoring_options(run)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=bool(run.record["recipe"].get("bf16"))):  # as it was trained
        scores, rows, _ = score_model(run.folder, pairs, description=f"{run.folder.name}, {split} pairs", **options)
    return scores, rows


def scoring_options(run: RunFolder) -> dict:
    """Those of the run's own recipe: its pairs are scored as they were in training."""
    recipe = run.record["recipe"]
    return {name: recipe[name] for name in (*LIMITS, "dtype") if name in recipe}


def scored_with(run: RunFolder, split: str) -> str:
    """For a note under figures 6 and 8: pairs, arithmetic and versions behind `run_scores`."""
    sources = ", ".join(entry["path"] for entry in mixture_entries(of_recipe(DataConfig, run.record["recipe"])))
    options = scoring_options(run) | ({"bf16": "autocast"} if run.record["recipe"].get("bf16") else {})
    facts = options | package_versions("torch", "transformers")
    made = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"Log-probabilities of given responses, {split} pairs of {sources}: {made}."


def judge_differences(run: RunFolder, split: str, rows: list[int]) -> np.ndarray:
    """Figure 6's REF: the judge's score of chosen minus rejected for the given source rows."""
    config = of_recipe(DataConfig, run.record["recipe"])
    scored = [rows.select_columns(["score_chosen", "score_rejected", "row"]) for _, rows in load_sources(config, split)]
    by_row = {row["row"]: row["score_chosen"] - row["score_rejected"] for row in mix(scored, config, split)}
    return np.array([by_row[row] for row in rows], dtype=np.float64)


def reward_differences(run: RunFolder, split: str, max_pairs: int) -> tuple[np.ndarray, list[int]]:
    """Figure 6: the run's own reward of chosen minus rejected, and the source rows."""
    scores, rows = run_scores(run, split, max_pairs, prior_context=None)
    chosen, rejected = native_rewards(run.objective, scores)
    return (chosen - rejected).numpy(), rows


@dataclass(frozen=True)
class Reading:
    """What one reading of the formula makes of a run's pairs: arrays (pairs,). `length_difference`: tokens, y_w - y_l."""

    delta_pmi: np.ndarray
    gamma: np.ndarray
    length_difference: np.ndarray


def gamma_readings(run: RunFolder, split: str, max_pairs: int) -> dict[str, Reading]:
    """Figure 8: margins of a run's pairs under its final policy, by three readings of the formula.

    "as in the recipe" marks the run's own.
    """
    # Bounds, schedule and what the prior of the first two is conditioned on are the run's; the rest is what each reading
    # says, since the paper doesn't (docs/FIDELITY.md).
    objective = rmipo_objective(run)
    context = "header" if objective.prior_context == "none" else objective.prior_context
    # The first two readings differ in what they divide by, and share their log-probabilities.
    matched, _ = run_scores(run, split, max_pairs, prior_context=context)
    released, _ = run_scores(run, split, max_pairs, prior_context="none", header_in_response=True)
    paper = {"fidelity": "paper", "prior_context": context}
    choices = {
        "per token": (paper | {"pmi_normalization": "token"}, matched),
        "summed, as printed": (paper | {"pmi_normalization": "sequence"}, matched),
        "released code": ({"fidelity": "release", "pmi_normalization": "token", "prior_context": "none"}, released),
    }
    readings = {}
    for name, (choice, scores) in choices.items():
        reading = build_objective(run.objective | choice)
        output = reading(PairScores(**scores))
        lengths = scores["chosen_lengths"] - scores["rejected_lengths"]
        arrays = (output.diagnostics["delta_pmi"], output.gamma, lengths)
        title = name + ", as in the recipe" * (reading == objective)
        readings[title] = Reading(*(array.double().numpy() for array in arrays))
    return readings


def summarize(readings: dict[str, Reading], gamma_min: float, gamma_max: float) -> pd.DataFrame:
    """A row for each reading: where delta_pmi and gamma lie, and how far delta_pmi follows the difference in length."""
    rows = {}
    for name, reading in readings.items():
        signal, gamma = reading.delta_pmi, reading.gamma
        low, median, high = np.quantile(signal, [0.05, 0.5, 0.95])
        rows[name] = {
            "delta_pmi mean": signal.mean(),
            "std": signal.std(ddof=1),
            "5%": low,
            "median": median,
            "95%": high,
            "chosen higher": (signal > 0).mean(),
            "mean gamma": gamma.mean(),
            "at gamma_max": (gamma >= gamma_max - AT_MAX).mean(),
            "within 0.01 of gamma_min": (gamma <= gamma_min + AT_MIN).mean(),
            "correlation with length difference": np.corrcoef(signal, reading.length_difference)[0, 1],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def rmipo_objective(run: RunFolder) -> RMiPO:
    """The objective of a run whose gamma Figure 8 can show; ReportError for any other."""
    # A constant margin, or one that another signal drives, would be drawn as if Delta_pmi had made it.
    objective = build_objective(run.objective) if run.objective else None
    follows = isinstance(objective, RMiPO) and (objective.target, objective.signal) == ("gamma", "pmi")
    if not follows or objective.schedule == "constant" or objective.gamma_min == objective.gamma_max:
        raise ReportError(f"figure 8 shows gamma over Delta_pmi, which that of {run.folder} doesn't follow")
    return objective


def density(values: np.ndarray, grid: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """Gaussian kernel density of `values` at `grid`, reflected at the bounds so that no mass leaks over them.

    The bandwidth is Silverman's: 0.9 * min(std, IQR / 1.34) * n^(-1/5).
    """
    values = np.asarray(values, dtype=np.float64)
    quartiles = np.quantile(values, [0.25, 0.75])
    spreads = [spread for spread in (values.std(), (quartiles[1] - quartiles[0]) / 1.34) if spread > 0]
    bandwidth = 0.9 * min(spreads, default=1e-3) * len(values) ** -0.2
    # Mirrored at each bound: what would leak over it comes back.
    images = np.concatenate([values, *(2 * bound - values for bound in (low, high) if np.isfinite(bound))])
    kernels = [np.exp(-0.5 * ((point - images) / bandwidth) ** 2).sum() for point in grid]
    result = np.array(kernels) / (len(values) * bandwidth * np.sqrt(2 * np.pi))
    return np.where((grid >= low) & (grid <= high), result, 0.0)


def jitter(differences: np.ndarray) -> np.ndarray:
    """Spread discrete differences uniformly over half a step to either side, as the paper does for Figure 6.

    Bounded by half the smallest step between distinct values, so that no two values change their order. Continuous
    scores, whose steps are tiny, stay practically where they are.
    """
    distinct = np.unique(np.round(differences, 6))  # 0.3 - 0.2 and 0.2 - 0.1 are the same step
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    return differences + np.random.default_rng(0).uniform(-step / 2, step / 2, size=len(differences))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-Wasserstein distance of two samples, from their quantile functions at 2001 levels."""
    levels = (np.arange(2001) + 0.5) / 2001
    return float(np.abs(np.quantile(a, levels) - np.quantile(b, levels)).mean())


def window(samples: list[np.ndarray], share: float = 0.99) -> np.ndarray:
    """401 points over the central `share` of all samples together, zero included."""
    tail = (1 - share) / 2
    low = min(np.quantile(sample, tail) for sample in samples)
    high = max(np.quantile(sample, 1 - tail) for sample in samples)
    margin = 0.05 * (high - low)
    return np.linspace(min(low, 0) - margin, max(high, 0) + margin, 401)


def draw_density(
    axis: Axes, grid: np.ndarray, curve: np.ndarray, color: str, label: str = "", shade: float = 0.13
) -> None:
    axis.plot(grid, curve, color=color, label=label)
    axis.fill_between(grid, curve, color=color, alpha=shade, linewidth=0)


def mark_zero(axis: Axes) -> None:
    axis.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axis.set_ylim(0, None)
    axis.margins(x=0)


@house_style
def figure3(signals: dict[str, dict[str, np.ndarray]], title: str, notes: Iterable[str] = ()) -> Figure:
    """Density of the log-likelihood and PMI differences of a pair, one panel per HH subset.

    `signals`: subset -> {"loglik": (pairs,), "pmi": (pairs,)}, in nats per token.
    """
    names = {"loglik": (r"$\Delta\log\pi(y|x)/|y|$", BLUE), "pmi": (r"$\Delta$pmi$/|y|$", RED)}
    figure, axes = panels(len(signals), height=3.0)
    for axis, letter, (subset, values) in zip(axes, "abc", signals.items(), strict=False):
        grid = window(list(values.values()))
        for key, (label, color) in names.items():
            sample = values[key]
            summary = f"{100 * np.mean(sample > 0):.0f}% > 0, mean/std {sample.mean() / sample.std():+z.2f}"
            draw_density(axis, grid, density(sample, grid), color, f"{label}: {summary}")
        mark_zero(axis)
        axis.set_xlabel("Chosen minus rejected (nats per token)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3))
        panel_letter(axis, letter, f"{subset.capitalize()}, {title} ({len(values['pmi'])} pairs)")
    axes[0].set_ylabel("Density")
    footnotes(figure, notes)
    return figure


@house_style
def figure6(reference: np.ndarray, rewards: dict[str, np.ndarray], title: str, notes: Iterable[str] = ()) -> Figure:
    """Density of reward differences of each method beside that of the judge's (REF).

    The legend gives the 1-Wasserstein distance to REF, W1, with its 95% bootstrap interval over pairs.

    Args:
        reference: (pairs,) judge's score of chosen minus rejected.
        rewards: method -> (pairs,) the method's reward of chosen minus rejected.
    """
    judged = jitter(reference)  # scores of few values would be combs beside continuous rewards
    judged = judged / judged.std()
    # No two rewards have the same unit; divided by the standard deviation alone, zero stays zero.
    scaled = {method: values / values.std() for method, values in rewards.items()}
    figure, (axis,) = panels(1, height=2.8)
    grid = window([judged, *scaled.values()])
    draw_density(axis, grid, density(judged, grid), GREY, "REF (judge's score)", shade=0.25)
    for method, values in scaled.items():
        low, high = distance_interval(values, judged)
        label = f"{method_label(method)}: $W_1$ to REF {wasserstein(values, judged):.2f} [{low:.2f}, {high:.2f}]"
        axis.plot(grid, density(values, grid), color=method_color(method), label=label)
    mark_zero(axis)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # headroom for the legend
    axis.set_xlabel("Reward of chosen minus rejected (standard deviations)")
    axis.set_ylabel("Density")
    axis.set_title(f"{title}, {len(judged)} pairs", loc="left")
    axis.legend(loc="upper right", title="$W_1$: 1-Wasserstein distance, 95% interval", title_fontsize=7)
    footnotes(figure, notes)
    return figure


def distance_interval(values: np.ndarray, judged: np.ndarray) -> tuple[float, float]:
    """95% interval of the distance by the bootstrap over pairs: each draw takes the same pairs of both."""
    draws = np.random.default_rng(0)
    rows = (draws.integers(0, len(values), len(values)) for _ in range(200))
    low, high = np.quantile([wasserstein(values[drawn], judged[drawn]) for drawn in rows], [0.025, 0.975])
    return float(low), float(high)


@house_style
def figure8(
    readings: dict[str, Reading],
    objective: RMiPO,
    title: str,
    paper_peak: float | None = None,
    notes: Iterable[str] = (),
) -> Figure:
    """Gamma over Delta_pmi; then the distributions of Delta_pmi and gamma, a row for each reading of the formula.

    The curve of gamma is the density of the pairs strictly between the bounds (left scale); the pins are the shares of
    pairs at the two bounds (right scale).
    """
    figure, axes = panels(3, height=1.25, rows=len(readings), width_ratios=(1, 1, 1.2))
    specs = axes[0].get_gridspec()
    for axis in axes[0::3]:
        axis.remove()  # the schedules are one panel beside all rows
    draw_schedules(figure.add_subplot(specs[:, 0]), objective)
    for signal, gamma, letter, (name, reading) in zip(axes[1::3], axes[2::3], "bcd", readings.items(), strict=False):
        grid = window([reading.delta_pmi], 0.98)
        draw_density(signal, grid, density(reading.delta_pmi, grid), BLUE)
        mark_zero(signal)
        signal.set_yticks([])
        panel_letter(signal, letter, name)
        draw_gamma(gamma, reading.gamma, objective.gamma_min, objective.gamma_max, paper_peak)
        gamma.set_title(f"mean {reading.gamma.mean():.2f}", loc="right")
    for axis in axes[2:-1:3]:
        axis.tick_params(labelbottom=False)
    axes[-2].set_xlabel(r"$\Delta$pmi (nats; per token or summed)")
    axes[-1].set_xlabel(r"$\gamma$" + ("" if paper_peak is None else " (dotted: the paper's peak)"))
    figure.suptitle(title, fontsize=9)
    footnotes(figure, notes)
    return figure


def draw_schedules(axis: Axes, objective: RMiPO) -> None:
    signal, low, high = torch.linspace(-1, 4, 501), objective.gamma_min, objective.gamma_max
    colors = {"exponential": RED, "linear": BLUE, "cosine": GREEN, "constant": ORANGE}
    for schedule in SCHEDULES:
        margin = scheduled_margin(signal, low, high, schedule, objective.span)
        width, line = (2, "-") if schedule == objective.schedule else (1, "--")
        axis.plot(signal, margin, color=colors[schedule], linewidth=width, linestyle=line, label=schedule)
    axis.set_yticks(sorted({low, high, round((low + high) / 2, 4)}))
    axis.set_xlabel(r"$\Delta$pmi")
    axis.set_ylabel(r"$\gamma$")
    axis.margins(x=0)
    axis.legend(loc="upper right")
    panel_letter(axis, "a", "Schedules (Table 7)")


def draw_gamma(axis: Axes, values: np.ndarray, low: float, high: float, paper_peak: float | None) -> None:
    # A density estimate would smear the pairs at a bound into a peak that isn't there.
    at_low, at_high = values <= low + AT_MIN, values >= high - AT_MAX
    inner = values[~at_low & ~at_high]
    span = high - low
    if len(inner) > 1:
        grid = np.linspace(low, high, 401)
        draw_density(axis, grid, density(inner, grid, low, high), PURPLE)
    axis.set_ylim(0, None)
    pins = axis.twinx()
    pins.grid(False)
    pins.spines["right"].set_visible(True)
    for x, share in ((low, at_low.mean()), (high, at_high.mean())):
        if share < 0.005:  # would read 0%
            continue
        pins.plot([x, x], [0, share], color="black", linewidth=2)
        pins.plot(x, share, "o", color="black", markersize=4)
        side = "left" if x == low else "right"
        offset = 0.03 * span if x == low else -0.03 * span
        height = max(share, 0.2)  # clear of the axis and of the curve's tail
        pins.text(x + offset, height, f"{100 * share:.0f}%", ha=side, va="center", fontsize=7.5, bbox=BEHIND_TEXT)
    pins.set_ylim(0, 1.08)
    pins.set_ylabel("At a bound")
    pins.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    if paper_peak is not None:
        axis.axvline(paper_peak, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlim(low - 0.06 * span, high + 0.06 * span)
    axis.set_ylabel("Density")
