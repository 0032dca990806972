"""Standard errors and intervals of the numbers that evaluations report."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 0


class Interval(NamedTuple):
    """A mean with its standard error and 95% interval."""

    mean: float
    standard_error: float
    low: float
    high: float


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent `values`; 0 for fewer than two, which say nothing of their spread."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of `values` by the percentile bootstrap; the same values give the same interval.

    For two methods on the same prompts `values` is what one prompt says of both (a win, a difference): resampling
    prompts keeps what they have in common, which makes it the paired bootstrap.
    """
    values, draws = np.asarray(values, dtype=np.float64), np.random.default_rng(SEED)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(np.std(means)), float(low), float(high))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Per pair 1 where ours is larger, 0 where theirs is, 0.5 for a tie."""
    return (np.sign(np.subtract(ours, theirs)) + 1) / 2
