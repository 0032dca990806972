"""The speed check sees what got worse, and only that."""

import copy

import pytest

from benchmarks.check import regressions


def run_with(time, memory):
    ratios = {"padded-simpo": {"time": {"median": time}, "memory": memory}}
    return {"cases": {"main": {"contenders": {"rmipo": {"ratios": ratios}, "trl-dpo": {"ratios": {}}}}}}


def test_within_tolerance():
    baseline = run_with(0.40, 0.30)
    assert regressions(baseline, copy.deepcopy(baseline)) == []
    assert regressions(baseline, run_with(0.45, 0.305)) == []
    assert regressions(baseline, run_with(0.10, 0.10)) == []


def test_slower_and_larger():
    assert regressions(run_with(0.40, 0.30), run_with(0.47, 0.31)) == [
        "main: time of rmipo / padded-simpo: 0.470, was 0.400 (+15% allowed)",
        "main: memory of rmipo / padded-simpo: 0.310, was 0.300 (+2% allowed)",
    ]


def test_no_case_in_common():
    with pytest.raises(ValueError, match=r"no case in common: \['main'\] and \['other'\]"):
        regressions(run_with(1, 1), {"cases": {"other": {}}})
