"""Figures drawn from per-pair scores: 3 (two signals on HH), 6 (reward differences), 8 (the margin gamma).

Functions of plain arrays; `pair_arrays` says where the arrays come from.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo import plots
from rmipo.evaluation.statistics import resamples
from rmipo.objectives import RMiPO
from rmipo.reporting.results import method_label


def jitter(differences: np.ndarray) -> np.ndarray:
    """Spread discrete differences uniformly over half a step to either side, as the paper does for Figure 6.

    Bounded by half the smallest step between distinct values, so that no two values change their order. Continuous
    scores, whose steps are tiny, stay practically where they are.
    """
    distinct = np.unique(np.round(differences, 6))  # 0.3 - 0.2 and 0.2 - 0.1 are the same step
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    return differences + np.random.default_rng(0).uniform(-step / 2, step / 2, size=len(differences))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-Wasserstein distance of two samples of one size."""
    return float(np.abs(np.sort(a) - np.sort(b)).mean())


def window(samples: list[np.ndarray], share: float = 0.99) -> np.ndarray:
    """401 points over the central `share` of all samples together, zero included."""
    tail = (1 - share) / 2
    low = min(np.quantile(sample, tail) for sample in samples)
    high = max(np.quantile(sample, 1 - tail) for sample in samples)
    margin = 0.05 * (high - low)
    return np.linspace(min(low, 0) - margin, max(high, 0) + margin, 401)


def draw_differences(axis: Axes, grid: np.ndarray, samples: dict[str, tuple[np.ndarray, str]]) -> None:
    """The densities of some samples, label -> (values, color), and a line at zero."""
    for label, (values, color) in samples.items():
        plots.draw_density(axis, grid, plots.density(values, grid), color, label)
    axis.axvline(0, color=plots.GREY, linewidth=0.8, linestyle="--")
    axis.set_ylim(0, None)
    axis.margins(x=0)


@plots.house_style
def figure3(signals: dict[str, dict[str, np.ndarray]], title: str, notes: Iterable[str] = ()) -> Figure:
    """Density of the log-likelihood and PMI differences of a pair, one panel per HH subset.

    `signals`: subset -> {"loglik": (pairs,), "pmi": (pairs,)}, in nats per token.
    """
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
    plots.footnotes(figure, notes)
    return figure


@plots.house_style
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
