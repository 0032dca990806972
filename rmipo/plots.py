"""The one style of every plot: print sizes, colours, panels, and how a figure is saved."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
