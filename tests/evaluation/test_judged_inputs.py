"""What judged benchmarks are given, and what they make of verdicts; without their packages."""

import gzip
import json
import os
import re

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca, mtbench
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
    # No rating; asked once more by a run beside this one, so counted once; out of MT-Bench's range; a line that a kill cut.
    scores = [(81, 1, -1), (81, 1, 7), (81, 1, 2), (81, 2, 11), (83, 1, 0), (82, 1, 4.5)]
    lines = [json.dumps(dict(zip(("question_id", "turn", "score"), row, strict=True))) for row in scores]
    path.write_text("\n".join([*lines, lines[0][:20]]))
    for _ in range(2):
        assert mtbench.read_verdicts(path) == {(81, 1): 7.0, (82, 1): 4.5}
