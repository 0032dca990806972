"""The one style of every plot: print sizes, colours, panels, what several figures draw, and how a figure is saved."""

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

PAGE_WIDTH = 6.75  # inches: two columns of the paper's style
AT_MAX = 1e-6  # gamma this close counts as at gamma_max: float32 rounds
AT_MIN = 0.01  # gamma this close counts as at gamma_min: the exponential reaches it only in the limit
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
METHOD_COLORS = {
    "initial": GREY, "dpo": BLUE, "simpo": ORANGE, "simper": GREEN, "rmipo": RED, "alpha-dpo": PURPLE, "beta-dpo": SKY,
    "epsilon-dpo": "#8C564B", "ipo": "#B2B200", "kto": "#004D40", "cpo": "#6A3D9A", "slic": "#A0A0A0",
}  # fmt: skip

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
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.dpi": 200,
    "savefig.dpi": 200,
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
def save(figure: Figure, path: Path, suffixes: tuple[str, ...] = (".png", ".pdf")) -> list[Path]:
    """Write and close the figure; returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in suffixes]
    for file in files:
        figure.savefig(file)
    plt.close(figure)
    return files


def method_color(method: str) -> str:
    return METHOD_COLORS.get(method, "black")


def panel_letter(axes: Axes, letter: str, title: str) -> None:
    axes.set_title(f"({letter}) {title}", loc="left")


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
        style = {"linewidth": 1.8, "linestyle": (0, (3, 2)), "zorder": 4} if method == "rmipo" else {"linewidth": 1.1}
        color = method_color(method)
        axis.plot(over_runs.index, over_runs["mean"], color=color, label=label(method), **style)
        axis.fill_between(over_runs.index, over_runs["min"], over_runs["max"], color=color, alpha=0.12, lw=0)
    axis.set_xlabel("Step")
    axis.margins(x=0.02)


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


def draw_density(axis: Axes, grid: np.ndarray, curve: np.ndarray, color: str, label: str = "") -> None:
    axis.plot(grid, curve, color=color, label=label)
    axis.fill_between(grid, curve, color=color, alpha=0.13, linewidth=0)


def draw_gamma(axis: Axes, values: np.ndarray, bounds: tuple[float, float], paper_peak: float | None = None) -> None:
    """Density of the margins strictly between the bounds (left scale), and pins with the shares at the two (right scale)."""
    low, high = bounds
    # A density estimate would smear the pairs at a bound into a peak that isn't there.
    at_low, at_high = values <= low + AT_MIN, values >= high - AT_MAX
    inner = values[~at_low & ~at_high]
    span = high - low or 1.0  # a constant margin
    if len(inner) > 1:
        grid = np.linspace(low, high, 401)
        draw_density(axis, grid, density(inner, grid, low, high), PURPLE)
    axis.set_ylim(0, None)
    pins = axis.twinx()
    pins.grid(False)
    pins.spines["right"].set_visible(True)
    for x, share in {low: at_low.mean(), high: at_high.mean()}.items():
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


def footnotes(figure: Figure, lines: Iterable[str]) -> None:
    """What has to be said under a figure, in small print; call it last."""
    text = "\n".join(textwrap.fill(line, 165) for line in lines)
    if text:
        figure.supxlabel(text, fontsize=5.5, x=0.01, ha="left")
