"""What all figures share: print style, colours, densities, and how a file is saved."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmipo.reporting.results import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE_WIDTH = 6.75  # inches: two columns of the paper's style

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
METHOD_COLORS = {
    "initial": GREY,
    "dpo": BLUE,
    "simpo": ORANGE,
    "simper": GREEN,
    "rmipo": RED,
    "alpha-dpo": PURPLE,
    "beta-dpo": SKY,
    "epsilon-dpo": "#8C564B",
    "ipo": "#B2B200",
    "kto": "#004D40",
    "cpo": "#6A3D9A",
    "slic": "#A0A0A0",
}

STYLE = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.dpi": 200,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: editable, and accepted by conferences
}


house_style = plt.rc_context(STYLE)  # decorates every function that draws: artists read the style when created


def panels(columns: int, height: float = 2.2, rows: int = 1, **kwargs) -> tuple[Figure, np.ndarray]:
    """A page-wide figure with rows x columns axes, `height` inches each; axes come as a flat array."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE_WIDTH, height * rows), layout="constrained", squeeze=False, **kwargs
    )
    return figure, axes.ravel()


@house_style
def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and PDF; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        figure.savefig(file)
    plt.close(figure)
    return files


def method_label(method: str) -> str:
    return METHODS.get(method, method)


def method_color(method: str) -> str:
    return METHOD_COLORS.get(method, "black")


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
    result = np.zeros(len(grid))
    images = [values] + [2 * bound - values for bound in (low, high) if np.isfinite(bound)]
    for image in images:
        for chunk in np.array_split(image, max(1, len(image) // 4096)):  # bounds memory at grid x 4096
            result += np.exp(-0.5 * ((grid[:, None] - chunk[None, :]) / bandwidth) ** 2).sum(axis=1)
    result /= len(values) * bandwidth * np.sqrt(2 * np.pi)
    return np.where((grid >= low) & (grid <= high), result, 0.0)


def jitter(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Spread discrete differences uniformly over half a step to either side, as the paper does for Figure 6.

    Bounded by half the smallest step between distinct values, so that no two values change their order. Continuous
    scores, whose steps are tiny, stay practically where they are.
    """
    distinct = np.unique(np.round(differences, 6))  # 0.3 - 0.2 and 0.2 - 0.1 are the same step
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    return differences + np.random.default_rng(seed).uniform(-step / 2, step / 2, size=len(differences))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each step (fewer at the start)."""
    return pd.Series(values).rolling(window, min_periods=1).mean().to_numpy()


def wasserstein(a: np.ndarray, b: np.ndarray, points: int = 2001) -> float:
    """1-Wasserstein distance of two samples, from their quantile functions."""
    levels = (np.arange(points) + 0.5) / points
    return float(np.abs(np.quantile(a, levels) - np.quantile(b, levels)).mean())


def footnotes(figure: Figure, lines: Iterable[str]) -> None:
    """What has to be said under a figure, in small print; call it last."""
    text = "\n".join(textwrap.fill(line, 165) for line in lines)
    if text:
        figure.supxlabel(text, fontsize=5.5, x=0.01, ha="left")


def panel_letter(axes: Axes, letter: str, title: str) -> None:
    axes.set_title(f"({letter}) {title}", loc="left")
