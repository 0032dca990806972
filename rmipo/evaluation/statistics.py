"""Standard errors and intervals of the numbers that evaluations report."""

from collections.abc import Iterator, Sequence
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


def resamples(count: int, draws: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Row numbers of `count` prompts drawn with replacement, `draws` times; for the same count always the same."""
    generator = np.random.default_rng(SEED)
    return (generator.integers(0, count, count) for _ in range(draws))


def interval(value: float, draws: Sequence[float]) -> Interval:
    """`value` with the standard error and the 95% percentile interval of its bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(value), float(np.std(draws)), float(low), float(high))


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of `values` by the percentile bootstrap; the same values give the same interval.

    For two methods on the same prompts `values` is what one prompt says of both (a win, a difference): resampling
    prompts keeps what they have in common, which makes it the paired bootstrap.
    """
    values = np.asarray(values, dtype=np.float64)
    return interval(values.mean(), [values[draw].mean() for draw in resamples(len(values))])


def wins(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Per pair 1 where ours is larger, 0 where theirs is, 0.5 for a tie."""
    return (np.sign(np.subtract(ours, theirs)) + 1) / 2
