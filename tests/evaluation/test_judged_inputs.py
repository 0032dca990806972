"""What judged benchmarks are given, and what they make of verdicts; without their packages."""

import gzip
import json
import os
import re
import sys

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca, leaderboard, mtbench
from rmipo.evaluation.alpaca import load_reference
from tests.helpers.rows import assistant, user, write

ROWS = [{"instruction": f"tell me {i} things", "output": f"thing {i}"} for i in range(20)]


def test_preference_pairs_as_reference(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("c", "4")]
    write(file, [{"prompt": [user(q)], "chosen": [assistant(c)]} for q, c in pairs])
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, zipped):
        rows, _ = load_reference(str(path))
        assert [(row["instruction"], row["output"]) for row in rows] == [("b", "1"), ("a", "2"), ("c", "4")]
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([*ROWS, ROWS[3]]))
    with pytest.raises(EvaluationError, match=r"twice\.json"):  # alpaca-eval would pair them crosswise
        load_reference(str(twice))


@pytest.mark.parametrize(
    ("environment", "settings", "named"),
    [
        ({}, {}, "OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "none", "OPENAI_API_BASE": "http://h/v1"}, {}, "OPENAI_API_BASE"),
        ({"OPENAI_API_KEY": "none"}, {"judge": "gpt-4"}, "judge"),
        ({"OPENAI_API_KEY": "none"}, {"reference": "absent.json"}, "absent.json"),
        ({"OPENAI_API_KEY": "none"}, {"reference": __file__}, "alpacaeval.reference"),
        ({"OPENAI_API_KEY": "none"}, {"generation": {"top_p": 2}}, "top_p is 2"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, environment, settings, named):
    for name in [name for name in os.environ if name.startswith("OPENAI")]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EvaluationError, match=re.escape(named)):
        alpaca.run(tmp_path / "no model", tmp_path, {"length_controlled": False, **settings})


def test_missing_package_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "reference.json").write_text(json.dumps(ROWS))
    settings = {"reference": str(tmp_path / "reference.json"), "length_controlled": False}
    for bench, module, given in (
        (alpaca, "alpaca_eval", settings), (mtbench, "mtbench_evaluator", {}), (leaderboard, "lm_eval", {}),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)  # as if it weren't installed
        with pytest.raises(EvaluationError, match=f"{module} isn't installed: make install EXTRAS=eval$"):
            bench.run(tmp_path / "no model", tmp_path, given)


def test_unusable_verdicts_are_dropped_and_an_empty_file_with_them(tmp_path):
    cache = tmp_path / "verdicts.json"
    assert alpaca.keep_usable(cache) == [] and not cache.exists()
    preferences = [-1, 1.0, None, 1.25, 2.0, 0.0, 2.5]
    cache.write_text(json.dumps([{"preference": preference} for preference in preferences]))
    assert [row["preference"] for row in alpaca.keep_usable(cache)] == [1.0, 1.25, 2.0]
    assert [row["preference"] for row in json.loads(cache.read_text())] == [1.0, 1.25, 2.0]
    cache.write_text(json.dumps([{"preference": -1}]))
    assert alpaca.keep_usable(cache) == [] and not cache.exists()


def test_mtbench_metrics_by_hand():
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


def test_unusable_lines_are_no_verdicts_of_mtbench(tmp_path):
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
