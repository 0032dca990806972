"""Figures drawn from per-pair scores: 3 (two signals on HH), 6 (reward differences), 8 (the margin gamma).

The scores are those in the HH evaluation's files, or of a run's own preference data, which its model scores here.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo import plots
from rmipo.data.pairs import LIMITS, load_pairs
from rmipo.data.sources import load_rows, mixture_entries
from rmipo.evaluation.hh import score_model
from rmipo.evaluation.statistics import resamples
from rmipo.objectives import PairScores, RMiPO, build_objective
from rmipo.objectives.rmipo import delta_pmi, pmi
from rmipo.page.look import sample
from rmipo.recipe.schema import DataConfig, of_recipe
from rmipo.record import package_versions
from rmipo.reporting import results as saved
from rmipo.reporting.figures_runs import on_other_pairs
from rmipo.reporting.results import ReportError, Result, RunFolder, method_label, model_label


def run_scores(
    run: RunFolder, split: str, max_pairs: int, prior_context: str | None, header_in_response: bool = False
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Scores of a run's own pairs under its final policy, and their source rows: the pairs that `make look` draws."""
    pairs = sample(load_pairs(of_recipe(DataConfig, run.record["recipe"]), split), max_pairs)
    options = {"description": f"{run.folder.name}, {split} pairs", **scoring_options(run)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=bool(run.record["recipe"].get("bf16"))):  # as it was trained
        scores, rows, _ = score_model(run.folder, pairs, prior_context, header_in_response, **options)
    return scores, rows


def scoring_options(run: RunFolder) -> dict:
    """Those of the run's own recipe: its pairs are scored as they were in training."""
    recipe = run.record["recipe"]
    return {name: recipe[name] for name in (*LIMITS, "dtype") if name in recipe}


def scored_with(run: RunFolder, split: str) -> str:
    """For a note under figures 6 and 8: pairs, arithmetic and versions behind `run_scores`."""
    recipe = run.record["recipe"]
    sources = ", ".join(entry["path"] for entry in mixture_entries(of_recipe(DataConfig, recipe)))
    facts = scoring_options(run) | {"bf16": recipe.get("bf16")} | package_versions("torch", "transformers")
    made = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"Log-probabilities of given responses, {split} pairs of {sources}: {made}."


def draw_differences(axis: Axes, grid: np.ndarray, samples: dict[str, tuple[np.ndarray, str]]) -> None:
    """The densities of some samples, label -> (values, color), and a line at zero."""
    for label, (values, color) in samples.items():
        plots.draw_density(axis, grid, plots.density(values, grid), color, label)
    axis.axvline(0, color=plots.GREY, linewidth=0.8, linestyle="--")
    axis.set_ylim(0, None)
    axis.margins(x=0)


def window(samples: list[np.ndarray], share: float = 0.99) -> np.ndarray:
    """401 points over the central `share` of all samples together, zero included."""
    tail = (1 - share) / 2
    low = min(np.quantile(sample, tail) for sample in samples)
    high = max(np.quantile(sample, 1 - tail) for sample in samples)
    margin = 0.05 * (high - low)
    return np.linspace(min(low, 0) - margin, max(high, 0) + margin, 401)


# ------------------ Figure 3


def hh_signals(outputs: Path, model: str, method: str) -> tuple[dict[str, dict[str, np.ndarray]], Result]:
    """Subset -> log-likelihood and PMI differences in nats per token, from eval/hh_<subset>.pt; and the result that those
    belong to. Raises ReportError without any.
    """
    evaluation = saved.load_result(outputs, model, method, "hh")
    if evaluation is None:
        raise ReportError(
            f"figure 3 has no HH scores of {model} {method}: run `{saved.eval_command(model, method, 'hh')}`"
        )
    files = {subset: evaluation.path.with_name(f"hh_{subset}.pt") for subset in ("helpful", "harmless")}
    # Scores of a subset without a number are of an earlier evaluation.
    scored = {subset: path for subset, path in files.items() if f"hh_{subset}" in evaluation.metrics}
    return {subset: differences(torch.load(path, weights_only=True)) for subset, path in scored.items()}, evaluation


def differences(scores: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A(w) - A(l), and Delta_pmi (Eq. 7), (pairs,), in nats per token."""
    logps, priors, lengths = (
        [scores[name.format(side)] for side in ("chosen", "rejected")]
        for name in ("{}_logps", "prior_{}_logps", "{}_lengths")
    )
    chosen, rejected = map(pmi, logps, priors, lengths)
    loglik = logps[0] / lengths[0] - logps[1] / lengths[1]
    return {"loglik": loglik.numpy(), "pmi": delta_pmi(chosen, rejected).numpy()}


@plots.house_style
def figure3(outputs: Path, model: str, method: str) -> Figure:
    """Density of the log-likelihood and PMI differences of a pair, one panel per HH subset."""
    signals, evaluation = hh_signals(outputs, model, method)
    title = f"{model_label(model)} {method_label(method)}{on_other_pairs([evaluation])}"
    names = {"loglik": (r"$\Delta\log\pi(y|x)/|y|$", plots.BLUE), "pmi": (r"$\Delta$pmi$/|y|$", plots.RED)}
    figure, axes = plots.panels(len(signals), height=3.0)
    for axis, letter, (subset, values) in zip(axes, "abc", signals.items(), strict=False):
        samples = {}
        for key, (label, color) in names.items():
            sample = values[key]
            summary = f"{100 * np.mean(sample > 0):.0f}% > 0, mean/std {sample.mean() / sample.std():+z.2f}"
            samples[f"{label}: {summary}"] = sample, color
        draw_differences(axis, window(list(values.values())), samples)
        axis.set_xlabel("Chosen minus rejected (nats per token)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3))
        plots.panel_letter(axis, letter, f"{subset.capitalize()}, {title} ({len(values['pmi'])} pairs)")
    axes[0].set_ylabel("Density")
    plots.footnotes(figure, saved.figure_notes([evaluation]))
    return figure


# ------------------ Figure 6


def judge_differences(run: RunFolder, split: str, rows: list[int]) -> np.ndarray:
    """REF: the judge's score of chosen minus rejected for the given source rows."""
    config = of_recipe(DataConfig, run.record["recipe"])
    scored = load_rows(config, split, lambda rows, _: rows.select_columns(["score_chosen", "score_rejected", "row"]))
    scored = scored.to_pandas().set_index("row").loc[rows]
    return (scored["score_chosen"] - scored["score_rejected"]).to_numpy(dtype=float)


def reward_differences(run: RunFolder, split: str, max_pairs: int) -> tuple[np.ndarray, list[int]]:
    """The run's own reward of chosen minus rejected, and the source rows."""
    scores, rows = run_scores(run, split, max_pairs, prior_context=None)
    # Margins, which read log pi(y), are no part of rewards: any values serve.
    scores |= {f"prior_{side}_logps": scores[f"{side}_logps"] for side in ("chosen", "rejected")}
    output = build_objective(run.objective)(PairScores(**scores))
    return (output.chosen_rewards - output.rejected_rewards).numpy(), rows


def jitter(differences: np.ndarray) -> np.ndarray:
    """Spread discrete differences uniformly over half a step to either side, as the paper does.

    Bounded by half the smallest step between distinct values, so that no two values change their order. Continuous
    scores, whose steps are tiny, stay practically where they are.
    """
    distinct = np.unique(np.round(differences, 6))  # 0.3 - 0.2 and 0.2 - 0.1 are the same step
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    return differences + np.random.default_rng(0).uniform(-step / 2, step / 2, size=len(differences))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-Wasserstein distance of two samples of one size."""
    return float(np.abs(np.sort(a) - np.sort(b)).mean())


@plots.house_style
def figure6(reference: np.ndarray, rewards: dict[str, np.ndarray], title: str, notes: Iterable[str] = ()) -> Figure:
    """Density of reward differences of each method beside that of the judge's (REF): (pairs,) each.

    The legend gives the 1-Wasserstein distance to REF, W1, with its 95% bootstrap interval over pairs.
    """
    judged = jitter(reference)  # scores of few values would be combs beside continuous rewards
    judged = judged / judged.std()
    # No two rewards have the same unit; divided by the standard deviation alone, zero stays zero.
    scaled = {method: values / values.std() for method, values in rewards.items()}
    figure, (axis,) = plots.panels(1, height=2.8)
    samples = {"REF (judge's score)": (judged, plots.GREY)}
    for method, values in scaled.items():
        # Each draw takes the same pairs of both.
        distances = [wasserstein(values[drawn], judged[drawn]) for drawn in resamples(len(values), 200)]
        low, high = np.quantile(distances, [0.025, 0.975])
        label = f"{method_label(method)}: $W_1$ to REF {wasserstein(values, judged):.2f} [{low:.2f}, {high:.2f}]"
        samples[label] = values, plots.method_color(method)
    draw_differences(axis, window([judged, *scaled.values()]), samples)
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # headroom for the legend
    axis.set_xlabel("Reward of chosen minus rejected (standard deviations)")
    axis.set_ylabel("Density")
    axis.set_title(f"{title}, {len(judged)} pairs", loc="left")
    axis.legend(loc="upper right", title="$W_1$: 1-Wasserstein distance, 95% interval", title_fontsize=7)
    plots.footnotes(figure, notes)
    return figure


# ------------------ Figure 8


def rmipo_objective(run: RunFolder) -> RMiPO:
    """The objective of a run whose gamma Figure 8 can show; ReportError for any other."""
    # A constant margin, or one that another signal drives, would be drawn as if Delta_pmi had made it.
    objective = build_objective(run.objective) if run.objective else None
    follows = isinstance(objective, RMiPO) and (objective.target, objective.signal) == ("gamma", "pmi")
    if not follows or objective.schedule == "constant" or objective.gamma_min == objective.gamma_max:
        raise ReportError(f"figure 8 shows gamma over Delta_pmi, which that of {run.folder} doesn't follow")
    return objective


def gamma_readings(run: RunFolder, split: str, max_pairs: int) -> dict[str, pd.DataFrame]:
    """A run's pairs under its final policy, by three readings of the formula; "as in the recipe" marks its own.

    A line for each pair: delta_pmi, gamma, length_difference (tokens, y_w - y_l).
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
        columns = {"delta_pmi": output.diagnostics["delta_pmi"], "gamma": output.gamma, "length_difference": lengths}
        frame = pd.DataFrame({column: values.double().numpy() for column, values in columns.items()})
        readings[name + ", as in the recipe" * (reading == objective)] = frame
    return readings


def summarize(readings: dict[str, pd.DataFrame], gamma_min: float, gamma_max: float) -> pd.DataFrame:
    """A row for each reading: where delta_pmi and gamma lie, and how far delta_pmi follows the difference in length."""
    rows = []
    for reading in readings.values():
        signal, gamma = reading["delta_pmi"], reading["gamma"]
        spread = signal.describe(percentiles=[0.05, 0.5, 0.95])[["mean", "std", "5%", "50%", "95%"]]
        rows.append(spread.rename({"mean": "delta_pmi mean", "50%": "median"}).to_dict() | {
            "chosen higher": (signal > 0).mean(),
            "mean gamma": gamma.mean(),
            "at gamma_max": (gamma >= gamma_max - plots.AT_MAX).mean(),
            "within 0.01 of gamma_min": (gamma <= gamma_min + plots.AT_MIN).mean(),
            "correlation with length difference": signal.corr(reading["length_difference"]),
        })  # fmt: skip
    return pd.DataFrame(rows, index=list(readings))


@plots.house_style
def figure8(
    readings: dict[str, pd.DataFrame],
    objective: RMiPO,
    title: str,
    peak: float | None = None,
    notes: Iterable[str] = (),
) -> Figure:
    """The distributions of Delta_pmi and gamma, a row for each reading of the formula.

    The curve of gamma is the density of the pairs strictly between the bounds (left scale); the pins are the shares of
    pairs at the two bounds (right scale). `peak`: where the paper has one.
    """
    figure, axes = plots.panels(2, height=1.25, rows=len(readings))
    for signal, gamma, letter, (name, reading) in zip(axes[0::2], axes[1::2], "abc", readings.items(), strict=False):
        draw_differences(signal, window([reading["delta_pmi"]], 0.98), {"": (reading["delta_pmi"], plots.BLUE)})
        signal.set_yticks([])
        plots.panel_letter(signal, letter, name)
        plots.draw_gamma(gamma, reading["gamma"].to_numpy(), (objective.gamma_min, objective.gamma_max), peak)
        gamma.set_title(f"mean {reading['gamma'].mean():.2f}", loc="right")
    for axis in axes[1:-1:2]:
        axis.tick_params(labelbottom=False)
    axes[-2].set_xlabel(r"$\Delta$pmi (nats; per token or summed)")
    axes[-1].set_xlabel(r"$\gamma$" + ("" if peak is None else " (dotted: the paper's peak)"))
    figure.suptitle(title, fontsize=9)
    plots.footnotes(figure, notes)
    return figure
