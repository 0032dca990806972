"""The study of margins: its grids, and the statistics of its contrasts, against values worked out by hand."""

import math

import numpy as np
import pytest

from rmipo.compare.margins import mean_gamma_arm, points, report
from rmipo.compare.trial import Trial
from rmipo.evaluation.statistics import contrast
from rmipo.reporting.comparison import scores


def test_grids_arms_and_scores_by_hand():
    grid = {"beta": [1.0, 2.0], "gamma_min, gamma_max": [[0.0, 2.0], [0.5, 1.4]]}
    assert points(grid) == [
        (("beta", 1.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 1.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
        (("beta", 2.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 2.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
    ]
    ((run, line), *_) = lines("rmipo", [0.5], noise=0.15, gamma=1.23456)
    assert mean_gamma_arm(run, line) == Trial("report", "simpo", 2e-4, 0, 0.15, (("beta", 2.0), ("gamma", 1.2346)))
    found = {s: {"metrics": {"per_prompt": {"x": values}}} for s, values in ((1, [50.0, 100.0]), (0, [0.0, 25.0]))}
    assert scores(found, "x") == [[0.0, 25.0], [50.0, 100.0]]
    assert scores({0: {"metrics": {"x": 0.5}}, 1: {"metrics": {"diverged": True}}}, "x") == [[0.5], [0.0]]


def test_contrasts_over_seeds_and_prompts():
    ours, theirs = [[0.5], [0.6], [0.7], [0.8]], [[0.4], [0.5], [0.5], [0.5]]  # differences 0.1, 0.1, 0.2, 0.3
    result = contrast(ours, theirs)
    assert result.mean == pytest.approx(0.175)
    assert result.p == 2 / 16  # all signs, or none, turned
    assert result.standard_error == pytest.approx(0.0957 / 2, rel=0.03)  # of a mean of four: sd 0.0957
    assert result.low < 0.1 and result.high > 0.25
    # One seed's difference varies by prompt, the seeds agree: the interval is that of the prompts alone.
    rng = np.random.default_rng(1)
    by_prompt = rng.normal(0.2, 1.0, size=100)
    result = contrast([by_prompt.tolist()] * 20, [[0.0] * 100] * 20)
    half_width = 1.96 * by_prompt.std() / 10
    assert (result.high - result.low) / 2 == pytest.approx(half_width, rel=0.1)
    assert not math.isclose(result.mean, 0.0)
    some = contrast([[50.0, None, 75.0], [25.0, None, 75.0]], [[25.0, None, 50.0], [None, None, 50.0]])
    assert some == contrast([[75.0], [75.0]], [[50.0], [50.0]]) and some.mean == 25.0


def lines(method, values, noise=0.0, objective=(), gamma=None):
    for seed, value in enumerate(values):
        result = {"metrics": {"right_probability": value}} | ({} if gamma is None else {"gamma_mean": gamma})
        yield Trial("report", method, 2e-4, seed, noise, objective), result


def test_the_report_names_the_arm_at_the_mean_margin_and_corrects_all_but_the_first_contrast():
    arms = [
        *lines("rmipo", [0.5, 0.6, 0.7, 0.8], gamma=1.25),
        *lines("shuffled", [0.4, 0.5, 0.6, 0.7], gamma=1.25),
        *lines("simpo", [0.5, 0.5, 0.7, 0.7]),
        *lines("simpo", [0.4, 0.5, 0.6, 0.7], objective=(("beta", 2.0), ("gamma", 1.25))),
    ]
    grids = [
        *lines("simpo", [0.2, 0.4], objective=(("beta", 1.0),)),
        *lines("simpo", [0.5, 0.7], objective=(("beta", 2.0),)),
    ]
    text = report(arms, grids, "right_probability")
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert rows["rmipo"][1] == "0.650 ± 0.129" and rows["rmipo"][5] == "1.25"
    # Every seed differs by 0.1: 2 of 16 sign flips are as far from 0. Of two secondary contrasts the smaller p doubles.
    assert rows["shuffled"][2:4] == ["+0.100 [+0.100, +0.100]", "0.125"]
    assert rows["simpo-mean-gamma"][2:4] == ["+0.100 [+0.100, +0.100]", "0.250"]
    (grid,) = (line for line in text.partition("Spread")[2].splitlines() if line.startswith("| simpo "))
    assert grid.split(" | ")[1:5] == ["2", "0.600", "0.450", "0.300"]
