"""What MT-Bench's numbers are made of, without its package."""

import json

import pytest

from rmipo.evaluation import mtbench


def test_metrics_by_hand():
    questions = [{"question_id": 1, "category": "math"}, {"question_id": 2, "category": "stem"}]
    metrics = mtbench.metrics_of({(1, 1): 8.0, (1, 2): 5.0, (2, 1): 3.0}, questions)
    assert metrics == {
        "mt_bench": pytest.approx(16 / 3), "mt_bench_turn1": 5.5, "mt_bench_turn2": 5.0, "mt_bench_math": 6.5,
        "mt_bench_stem": 3.0, "mt_bench_missing": 1,
        "mt_bench_standard_error": pytest.approx((3.5**2 / 2) ** 0.5 / 2**0.5),  # of the questions' 6.5 and 3.0
    }  # fmt: skip


def test_a_question_counts_with_both_turns_alone():
    questions = [{"question_id": number} for number in (1, 2, 3)]
    assert mtbench.per_question({(1, 1): 8.0, (1, 2): 5.0, (2, 1): 3.0}, questions) == [6.5, None, None]


def test_unusable_lines_are_not_verdicts(tmp_path):
    path = tmp_path / "judge_single.jsonl"
    rows = [
        {"question_id": 81, "turn": 1, "score": -1},  # no rating in the judge's answer
        {"question_id": 81, "turn": 1, "score": 7},
        {"question_id": 81, "turn": 1, "score": 2},  # asked once more by a run beside this one: counted once
        {"question_id": 81, "turn": 2, "score": 11},  # out of MT-Bench's range
        {"question_id": 83, "turn": 1, "score": 0},  # below it
        {"question_id": 82, "turn": 1, "score": 4.5},
    ]
    torn = json.dumps({"question_id": 82, "turn": 2, "score": 9})[:20]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    expected = {(81, 1): 7.0, (82, 1): 4.5}
    assert mtbench.read_verdicts(path) == expected
    assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [7, 4.5]
    assert mtbench.read_verdicts(path) == expected
    assert mtbench.read_verdicts(tmp_path / "absent.jsonl") == {}
