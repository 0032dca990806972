"""Standard errors, intervals and p-values of the numbers that evaluations report."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 0


class Interval(NamedTuple):
    """A mean with its standard error, its 95% interval, and the two-sided p-value of its being 0."""

    mean: float
    standard_error: float
    low: float
    high: float
    p: float


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent `values`; 0 for fewer than two, which say nothing of their spread."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def means(per_prompt: dict[str, Sequence[float | None]]) -> dict[str, float]:
    """Each metric's mean over the prompts that have a value, and its standard error as `<name>_standard_error`."""
    known = {name: [value for value in values if value is not None] for name, values in per_prompt.items()}
    errors = {f"{name}_standard_error": standard_error(values) for name, values in known.items()}
    return {name: statistics.mean(values) for name, values in known.items()} | errors


def resamples(count: int, draws: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Row numbers of `count` prompts drawn with replacement, `draws` times; for the same count always the same."""
    generator = np.random.default_rng(SEED)
    return (generator.integers(0, count, count) for _ in range(draws))


def interval(value: float, draws: Sequence[float]) -> Interval:
    """`value` with the standard error, the 95% percentile interval and the p-value of its bootstrap draws.

    p takes the draws for normal: counting those beyond 0 could give none below 1 / their number, which a correction for
    many comparisons would never leave significant.
    """
    low, high = np.quantile(draws, [0.025, 0.975])
    # The spread of the draws is the standard error itself: no division by their number.
    error = float(np.std(draws))
    p = math.erfc(abs(value) / error / 2**0.5) if error > 0 else 1.0
    return Interval(float(value), error, float(low), float(high), p)


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of `values` by the percentile bootstrap; the same values give the same interval.

    For two methods on the same prompts `values` is what one prompt says of both (a win, a difference): resampling
    prompts keeps what they have in common, which makes it the paired bootstrap.
    """
    values = np.asarray(values, dtype=np.float64)
    return interval(values.mean(), [values[draw].mean() for draw in resamples(len(values))])


def contrast(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Our mean minus theirs, (seeds, prompts) each, paired by both. Prompts for which a run has None are left out.

    p comes from flipping the signs of whole seeds: with s of them it can't fall below 2 / 2^s.
    """
    differences = np.atleast_2d(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))  # None is NaN
    differences = differences[:, ~np.isnan(differences).any(axis=0)]
    seeds, prompts = differences.shape
    if not prompts:  # nothing that both were measured on
        return Interval(np.nan, np.nan, np.nan, np.nan, 1.0)
    # Seeds and prompts are resampled together: another study would have others of both.
    draw, means = np.random.default_rng(SEED), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = differences[draw.integers(seeds, size=seeds)]
        means[i] = drawn[:, draw.integers(prompts, size=prompts)].mean()
    # A mean of s resampled seeds varies by (s - 1) / s of what a mean of s new ones would.
    scale = np.sqrt(seeds / max(seeds - 1, 1))
    mean = differences.mean()
    low, high = mean + scale * (np.quantile(means, [0.025, 0.975]) - mean)
    # Flipping signs assumes nothing about how the seeds are distributed.
    by_seed = differences.mean(axis=1)
    flipped = np.array([np.mean(signs * by_seed) for signs in itertools.product([1, -1], repeat=seeds)])
    return Interval(mean, scale * means.std(), low, high, np.mean(np.abs(flipped) >= abs(mean) - 1e-12))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Per pair 1 where ours is larger, 0 where theirs is, 0.5 for a tie, NaN where one is missing."""
    return (np.sign(np.subtract(ours, theirs)) + 1) / 2


def holm(p_values: Sequence[float]) -> np.ndarray:
    """The p-values corrected for their number by Holm's step-down procedure."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    # From the smallest: each is multiplied by the number of those not yet rejected.
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(1, stepped)[np.argsort(order)]


def repeated_share(sequences: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams of tokens that occurred before in the same sequence, over all 4-grams; 0 where there is none."""
    ngrams = [list(zip(*(ids[i:] for i in range(4)), strict=False)) for ids in sequences]
    total, distinct = sum(map(len, ngrams)), sum(len(set(own)) for own in ngrams)
    return (total - distinct) / total if total else 0.0
