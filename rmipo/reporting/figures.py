"""What several figures compute, draw and say: densities, distances, costs, curves, notes."""

import textwrap
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from rmipo.plots import method_color, panel_letter
from rmipo.reporting.results import OURS


def density(
    values: np.ndarray, grid: np.ndarray, low: float = -np.inf, high: float = np.inf, bandwidth: float | None = None
) -> np.ndarray:
    """Gaussian kernel density of `values` at `grid`, reflected at the bounds so that no mass leaks over them.

    `bandwidth` defaults to Silverman's rule: 0.9 * min(std, IQR / 1.34) * n^(-1/5).
    """
    values = np.asarray(values, dtype=np.float64)
    if bandwidth is None:
        quartiles = np.quantile(values, [0.25, 0.75])
        spreads = [spread for spread in (values.std(), (quartiles[1] - quartiles[0]) / 1.34) if spread > 0]
        bandwidth = 0.9 * min(spreads, default=1e-3) * len(values) ** -0.2
    # Mirrored at each bound: what would leak over it comes back.
    images = np.concatenate([values, *(2 * bound - values for bound in (low, high) if np.isfinite(bound))])
    kernels = [np.exp(-0.5 * ((point - images) / bandwidth) ** 2).sum() for point in grid]
    result = np.array(kernels) / (len(values) * bandwidth * np.sqrt(2 * np.pi))
    return np.where((grid >= low) & (grid <= high), result, 0.0)


def jitter(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Spread discrete differences uniformly over half a step to either side, as the paper does for Figure 6.

    Bounded by half the smallest step between distinct values, so that no two values change their order. Continuous
    scores, whose steps are tiny, stay practically where they are.
    """
    distinct = np.unique(np.round(differences, 6))  # 0.3 - 0.2 and 0.2 - 0.1 are the same step
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    return differences + np.random.default_rng(seed).uniform(-step / 2, step / 2, size=len(differences))


def wasserstein(a: np.ndarray, b: np.ndarray, points: int = 2001) -> float:
    """1-Wasserstein distance of two samples, from their quantile functions."""
    levels = (np.arange(points) + 0.5) / points
    return float(np.abs(np.quantile(a, levels) - np.quantile(b, levels)).mean())


def draw_costs(axis: Axes, lengths: dict[str, float], memory: list[str], labels: list[str], xlabel: str) -> None:
    """Horizontal bars of time, method -> length, with the peak memory written at the foot of each."""
    axis.barh(range(len(lengths)), list(lengths.values()), 0.7, color=list(map(method_color, lengths)))
    behind = [withStroke(linewidth=2, foreground="white")]  # the text lies over bars and marks
    for place, text in enumerate(memory):
        style = {"textcoords": "offset points", "fontsize": 6.5, "path_effects": behind}
        axis.annotate(text, (0, place), (3, 0), va="center", **style)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(xlabel)
    panel_letter(axis, "a", "Time and peak memory")


def draw_curves(axis: Axes, points: pd.DataFrame, name: str, label: Callable[[str], str]) -> None:
    """The column `name` over the step, a line per method: the mean over its runs, with their range as a band."""
    for method, of_method in points.groupby("method", sort=False):
        over_runs = of_method.groupby("step")[name].agg(["mean", "min", "max"])
        # Dashed on top of the others: where two lines coincide, both are seen.
        style = {"linewidth": 1.8, "linestyle": (0, (3, 2)), "zorder": 4} if method == OURS else {"linewidth": 1.1}
        color = method_color(method)
        axis.plot(over_runs.index, over_runs["mean"], color=color, label=label(method), **style)
        axis.fill_between(over_runs.index, over_runs["min"], over_runs["max"], color=color, alpha=0.12, lw=0)
    axis.set_xlabel("Step")
    axis.margins(x=0.02)


def footnotes(figure: Figure, lines: Iterable[str]) -> None:
    """What has to be said under a figure, in small print; call it last."""
    text = "\n".join(textwrap.fill(line, 165) for line in lines)
    if text:
        figure.supxlabel(text, fontsize=5.5, x=0.01, ha="left")
