"""What several figures compute and say: densities, distances, notes under a figure."""

import textwrap
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure


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


def footnotes(figure: Figure, lines: Iterable[str]) -> None:
    """What has to be said under a figure, in small print; call it last."""
    text = "\n".join(textwrap.fill(line, 165) for line in lines)
    if text:
        figure.supxlabel(text, fontsize=5.5, x=0.01, ha="left")
