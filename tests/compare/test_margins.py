"""The study of margins: its grids, and the statistics of its contrasts, against values worked out by hand."""

import math

import numpy as np
import pytest

from rmipo.compare.margins import points
from rmipo.reporting.spread import contrast, holm


def test_a_grid_is_every_combination_and_joined_names_move_together():
    grid = {"beta": [1.0, 2.0], "gamma_min, gamma_max": [[0.0, 2.0], [0.5, 1.4]]}
    assert points(grid) == [
        (("beta", 1.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 1.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
        (("beta", 2.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 2.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
    ]


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_a_contrast_over_seeds():
    ours, theirs = [[0.5], [0.6], [0.7], [0.8]], [[0.4], [0.5], [0.5], [0.5]]  # differences 0.1, 0.1, 0.2, 0.3
    result = contrast(ours, theirs)
    assert result.mean == pytest.approx(0.175)
    assert result.p == 2 / 16  # all signs, or none, turned
    # 2.8 standard errors of a mean of four: sd 0.0957 / sqrt(4)
    assert result.detectable == pytest.approx(2.8 * 0.0957 / 2, rel=0.03)
    assert result.low < 0.1 and result.high > 0.25


def test_a_contrast_counts_prompts_and_seeds():
    """One seed's difference varies by prompt, the seeds agree: the interval is that of the prompts alone."""
    rng = np.random.default_rng(1)
    by_prompt = rng.normal(0.2, 1.0, size=100)
    result = contrast([by_prompt.tolist()] * 20, [[0.0] * 100] * 20)
    half_width = 1.96 * by_prompt.std() / 10
    assert (result.high - result.low) / 2 == pytest.approx(half_width, rel=0.1)
    assert not math.isclose(result.mean, 0.0)
