"""Differences prompt by prompt against a slow bootstrap by hand, and where tables and figures show them."""

import csv
import math
import random
from pathlib import Path

import pytest

from rmipo.reporting.paired import paired_difference
from rmipo.reporting.render import csv_text, markdown
from rmipo.reporting.results import load_result
from rmipo.reporting.tables import build_table, fill
from tests.helpers.result_files import write_result

LLAMA = "llama3-8b-instruct"
DRAW = random.Random(0)
EASE = [DRAW.uniform(0, 80) for _ in range(60)]  # of the prompts, for every method alike
OURS = [ease + DRAW.uniform(0, 20) for ease in EASE]
THEIRS = [ease + DRAW.uniform(0, 15) for ease in EASE]


def result(outputs: Path, method: str, values: list[float | None], metric: str = "mt_bench", **changes):
    known = [value for value in values if value is not None]
    write_result(
        outputs, LLAMA, method, "mtbench", {metric: sum(known) / len(known)}, per_prompt={metric: values}, **changes
    )
    return load_result(outputs, LLAMA, method, "mtbench")


def test_against_a_bootstrap_by_hand(tmp_path):
    found = paired_difference([result(tmp_path, "rmipo", OURS)], [result(tmp_path, "dpo", THEIRS)], "mt_bench")
    draw, means = random.Random(1), []
    for _ in range(4000):
        prompts = [draw.randrange(60) for _ in range(60)]
        means.append(sum(OURS[i] for i in prompts) / 60 - sum(THEIRS[i] for i in prompts) / 60)
    means.sort()
    assert found.mean == pytest.approx((sum(OURS) - sum(THEIRS)) / 60)
    assert found.low == pytest.approx(means[100], abs=0.15) and found.high == pytest.approx(means[3900], abs=0.15)
    assert found.high - found.low < 5  # the prompts' ease, of standard deviation 23, has gone
    assert found.p == pytest.approx(math.erfc(found.mean / found.standard_error / 2**0.5)) and 0 < found.p < 0.05


def test_seeds_are_averaged_prompts_without_a_verdict_left_out_and_draws_compared_one_by_one(tmp_path):
    ours = [result(tmp_path, "rmipo", [8.0, 2.0, None, 7.0]), result(tmp_path, "again", [6.0, 5.0, 5.0, 7.0])]
    theirs = [result(tmp_path, "dpo", [5.0, 1.0, 3.0, None])]
    found = paired_difference(ours, theirs, "mt_bench")  # of the first two prompts: 7 - 5 and 3.5 - 1
    assert found.mean == 2.25 and (found.low, found.high) == (2.0, 2.5)
    assert paired_difference(ours, [result(tmp_path, "short", [5.0])], "mt_bench") is None
    write_result(tmp_path, LLAMA, "old", "mtbench", {"mt_bench": 7.0})
    assert paired_difference(ours, [load_result(tmp_path, LLAMA, "old", "mtbench")], "mt_bench") is None
    assert paired_difference([], theirs, "mt_bench") is None

    def lc(method: str, rate: float, draws: list[float]):
        write_result(tmp_path, LLAMA, method, "alpacaeval", {"alpacaeval2_lc": rate}, draws={"alpacaeval2_lc": draws})
        return load_result(tmp_path, LLAMA, method, "alpacaeval")

    ours = [lc("rmipo", 30.0, [29.0, 31.0, 35.0]), lc("again", 32.0, [31.0, 33.0, 33.0])]  # means 30, 32, 34
    theirs = [lc("dpo", 28.0, [27.0, 31.0, 31.0])]
    found = paired_difference(ours, theirs, "alpacaeval2_lc")  # draws 3, 1, 3
    assert found.mean == 3.0 and found.low == pytest.approx(1.1) and found.high == 3.0
    assert found.standard_error == pytest.approx((8 / 9) ** 0.5)


def test_a_table_of_the_paper_has_the_differences(tmp_path):
    for method, values in (("rmipo", [7.0, 9.0]), ("dpo", [6.5, 8.5]), ("initial", [7.0, 9.5])):
        result(tmp_path, method, values)
    write_result(tmp_path, LLAMA, "simpo", "mtbench", {"mt_bench": 7.0})  # of before, without values per prompt
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    lines = [line for line in markdown(filled).splitlines() if line.startswith(("| Initial", "| DPO", "| SimPO"))]
    ends = ["8.1 / 8.2 / +0.2 / -0.2 [-0.5, +0.0] |", "8.0 / 7.5 / -0.5 / +0.5 [+0.5, +0.5] |", "8.0 / 7.0 / -1.0 |"]
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))
    rows = {row["Method"]: row for row in csv.DictReader(csv_text(filled).splitlines()) if "MT" in row["Column"]}
    columns = [rows["DPO"][f"behind_rmipo{end}"] for end in ("", "_low", "_high")]
    assert columns == ["0.5"] * 3 and rows["RMiPO"]["behind_rmipo"] == rows["SimPO"]["behind_rmipo"] == ""
