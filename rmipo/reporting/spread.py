"""Differences between arms over seeds and prompts, and the figure of what a grid of hyperparameters gives."""

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rmipo.plots import house_style, method_color, panels
from rmipo.reporting.results import method_label

DRAWS = 10_000
POWER = 2.8  # standard errors of a difference that is found at 5% in four of five studies: 1.96 + 0.84


@dataclass(frozen=True)
class Contrast:
    """First arm minus second: mean, bounds of the 95% interval, two-sided p, and the smallest difference that 80% of studies
    of this size would find."""

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def contrast(ours: list[list[float]], theirs: list[list[float]]) -> Contrast:
    """Compare two arms, (seeds, prompts) each, paired by seed and prompt.

    With s seeds p can't fall below 2 / 2^s.
    """
    differences = np.asarray(ours) - np.asarray(theirs)
    seeds, prompts = differences.shape
    # Seeds and prompts are resampled together: another study would have others of both.
    draw = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn = differences[draw.integers(seeds, size=seeds)]
        means[i] = drawn[:, draw.integers(prompts, size=prompts)].mean()
    # A mean of s resampled seeds varies by (s - 1) / s of what a mean of s new ones would.
    scale = np.sqrt(seeds / max(seeds - 1, 1))
    mean = differences.mean()
    low, high = mean + scale * (np.quantile(means, [0.025, 0.975]) - mean)
    # Flipping the signs of whole seeds assumes nothing about how they are distributed.
    by_seed = differences.mean(axis=1)
    flipped = np.array([np.mean(signs * by_seed) for signs in itertools.product([1, -1], repeat=seeds)])
    p = np.mean(np.abs(flipped) >= abs(mean) - 1e-12)
    return Contrast(mean, low, high, p, POWER * scale * means.std())


@house_style
def draw_spread(outcomes: dict[str, list[float]], label: str) -> Figure:
    """One strip per method: each point a setting of its grid, the bar their median."""
    figure, (axis,) = panels(1, height=1.0 + 0.5 * len(outcomes))
    for row, (method, values) in enumerate(outcomes.items()):
        offsets = np.linspace(-0.18, 0.18, len(values))  # so that equal outcomes stay visible
        axis.scatter(np.sort(values), row + offsets, color=method_color(method), s=14, alpha=0.8)
        axis.vlines(np.median(values), row - 0.3, row + 0.3, color=method_color(method), linewidth=1.5)
    axis.set_yticks(range(len(outcomes)), [f"{method_label(name)}\n{len(v)} settings" for name, v in outcomes.items()])
    axis.set_ylim(len(outcomes) - 0.5, -0.5)
    axis.set_xlabel(label)
    return figure
