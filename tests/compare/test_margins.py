"""The study of margins: its grids, and the statistics of its contrasts, against values worked out by hand."""

import math
from dataclasses import asdict

import numpy as np
import pytest

from rmipo.compare.margins import mean_gamma_arm, points, report
from rmipo.compare.trial import Trial
from rmipo.evaluation.statistics import contrast
from rmipo.reporting.comparison import scores


def test_a_grid_is_every_combination_and_joined_names_move_together():
    grid = {"beta": [1.0, 2.0], "gamma_min, gamma_max": [[0.0, 2.0], [0.5, 1.4]]}
    assert points(grid) == [
        (("beta", 1.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 1.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
        (("beta", 2.0), ("gamma_min", 0.0), ("gamma_max", 2.0)),
        (("beta", 2.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
    ]


def test_a_contrast_over_seeds():
    ours, theirs = [[0.5], [0.6], [0.7], [0.8]], [[0.4], [0.5], [0.5], [0.5]]  # differences 0.1, 0.1, 0.2, 0.3
    result = contrast(ours, theirs)
    assert result.mean == pytest.approx(0.175)
    assert result.p == 2 / 16  # all signs, or none, turned
    assert result.standard_error == pytest.approx(0.0957 / 2, rel=0.03)  # of a mean of four: sd 0.0957
    assert result.low < 0.1 and result.high > 0.25


def test_a_contrast_counts_prompts_and_seeds():
    """One seed's difference varies by prompt, the seeds agree: the interval is that of the prompts alone."""
    rng = np.random.default_rng(1)
    by_prompt = rng.normal(0.2, 1.0, size=100)
    result = contrast([by_prompt.tolist()] * 20, [[0.0] * 100] * 20)
    half_width = 1.96 * by_prompt.std() / 10
    assert (result.high - result.low) / 2 == pytest.approx(half_width, rel=0.1)
    assert not math.isclose(result.mean, 0.0)


def lines(method, values, noise=0.0, objective=(), gamma=None):
    for seed, value in enumerate(values):
        run = Trial("report", method, 2e-4, seed, noise, objective)
        result = {"metrics": {"right_probability": value}, "seconds_per_step": 0.1, "peak_memory_mib": 1.0}
        made_with = {"commit": "abc", "versions": {"torch": "2"}, "hardware": ["2 CPU cores"]}
        yield run, asdict(run) | result | made_with | ({} if gamma is None else {"gamma_mean": gamma})


def test_the_report_names_the_arm_at_the_mean_margin_and_corrects_all_but_the_first_contrast():
    arms = [
        *lines("rmipo", [0.5, 0.6, 0.7, 0.8, 0.5, 0.8], gamma=1.25),
        *lines("shuffled", [0.4, 0.5, 0.6, 0.7, 0.4, 0.7], gamma=1.25),
        *lines("simpo", [0.5, 0.5, 0.7, 0.7, 0.5, 0.8]),
        *lines("simpo", [0.4, 0.5, 0.6, 0.7, 0.4, 0.7], objective=(("beta", 2.0), ("gamma", 1.25))),
    ]
    grids = [
        *lines("simpo", [0.2, 0.4], objective=(("beta", 1.0),)),
        *lines("simpo", [0.5, 0.7], objective=(("beta", 2.0),)),
    ]
    text = report(arms, grids, [], ["right_probability"])
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert rows["RMiPO"][2] == "0.650 ± 0.138" and rows["RMiPO"][6] == "1.250 ± 0.000"
    # Every seed differs by 0.1: 2 of 64 sign flips are as far from 0. Of two secondary contrasts the smaller p doubles.
    assert rows["shuffled"][3:5] == ["-0.100 [-0.100, -0.100]", "0.031"]
    assert rows["SimPO at RMiPO's mean γ"][3:5] == ["-0.100 [-0.100, -0.100]", "0.062"]
    (grid,) = (line for line in text.partition("Spread")[2].splitlines() if line.startswith("| simpo "))
    assert grid.split(" | ")[1:5] == ["2", "0.600", "0.450", "0.300"]
    assert text.endswith("Commit abc; torch 2; 2 CPU cores.\n")


def test_an_arm_at_the_mean_margin_has_that_of_its_seed():
    ((run, line), *_) = lines("rmipo", [0.5], noise=0.15, gamma=1.23456)
    assert mean_gamma_arm(run, line) == Trial("report", "simpo", 2e-4, 0, 0.15, (("beta", 2.0), ("gamma", 1.2346)))


def test_per_prompt_results_are_compared_by_prompt():
    lines = {
        seed: {"metrics": {"per_prompt": {"x": values}}} for seed, values in ((1, [50.0, 100.0]), (0, [0.0, 25.0]))
    }
    assert scores(lines, "x") == [[0.0, 25.0], [50.0, 100.0]]
    assert scores({0: {"metrics": {"x": 0.5}}, 1: {"metrics": {"diverged": True}}}, "x") == [[0.5], [0.0]]


def test_a_prompt_that_says_nothing_of_a_run_is_left_out():
    some = contrast([[50.0, None, 75.0], [25.0, None, 75.0]], [[25.0, None, 50.0], [None, None, 50.0]])
    assert some == contrast([[75.0], [75.0]], [[50.0], [50.0]]) and some.mean == 25.0
