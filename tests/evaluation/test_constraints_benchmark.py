"""The benchmark of verifiable constraints on a small model: what is sampled, and what is made of it."""

import json
import statistics

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from rmipo.constraints.instructions import DRAWN, followed
from rmipo.constraints.prompts import read_prompts
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.constraints import BOILERPLATE, FAMILIES, by_family, specific
from tests.helpers.tiny_model import write_model


def test_shares_of_answers_that_follow_all_and_each_of_their_constraints(tmp_path):
    write_model(tmp_path)
    generation = {"temperature": 1.0, "max_new_tokens": 6, "dtype": "float32", "engine": "transformers"}
    settings = {"generation": generation, "first_n": 6, "answers": 2}
    result = BENCHMARKS["constraints"].run(tmp_path, tmp_path / "eval", settings)
    metrics = result["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "eval/constraints.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(len(row["answers"]) == 2 for row in rows)
    assert sum(len(set(row["answers"])) == 2 for row in rows) > 3  # one seed for each answer
    checks = [[followed(row["constraints"], answer) for answer in row["answers"]] for row in rows]
    every = [[all(check) for check in of_prompt] for of_prompt in checks]
    each = [[sum(check) / len(check) for check in of_prompt] for of_prompt in checks]
    assert any(0 < share < 1 for shares in each for share in shares)  # else all and each were the same
    assert metrics["constraints_all"] == pytest.approx(100 * sum(map(sum, every)) / 12)
    assert metrics["constraints_each"] == pytest.approx(100 * sum(map(sum, each)) / 12)
    of_prompts = [50 * sum(answers) for answers in every]  # the error is over prompts
    error = statistics.stdev(of_prompts) / 6**0.5
    assert metrics["constraints_all_standard_error"] == pytest.approx(error)
    assert by_family(rows).items() <= metrics.items()
    baselines = (("constraints_fixed", lambda row: BOILERPLATE), ("constraints_repeated", lambda row: row["prompt"]))
    for name, text in baselines:
        assert metrics[name] == pytest.approx(100 / 6 * sum(all(followed(r["constraints"], text(r))) for r in rows))
    (answers,) = (tmp_path / "eval/answers").glob("*.jsonl")
    assert metrics["constraints_cut"] == pytest.approx(100 * answers.read_text().count('"finish": "length"') / 12)
    own = [value for row in rows for value in row["specific"]]
    assert metrics["constraints_specific"] == pytest.approx(100 * sum(own) / 12)
    assert result["per_prompt"]["constraints_all"] == of_prompts
    assert result["per_prompt"]["constraints_each"] == pytest.approx([50 * sum(shares) for shares in each])


def test_the_first_prompts_are_those_after_the_ones_left_out(tmp_path):
    write_model(tmp_path)
    generation = {"temperature": 0.0, "max_new_tokens": 2, "dtype": "float32", "engine": "transformers"}
    settings = {"generation": generation, "first_n": 3, "skip_n": 2}
    BENCHMARKS["constraints"].run(tmp_path, tmp_path / "eval", settings)
    rows = [json.loads(line) for line in (tmp_path / "eval/constraints.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_prompts("test")[2:5]]


def test_a_fixed_text_gets_nothing_and_own_constraints_count():
    rows = read_prompts("test")[100:140]
    fixed = specific([{**row, "answers": [BOILERPLATE], "whole": [True]} for row in rows])
    assert sum(value > 0 for (value,) in fixed) > 3 and sum(value for (value,) in fixed) == pytest.approx(0, abs=1e-9)
    title = {"id": "detectable_format:title", "arguments": {}}
    comma = {"id": "punctuation:no_comma", "arguments": {}}
    asked = [{"constraints": [title]}, {"constraints": [comma]}, {"constraints": [comma, title]}]
    answers = [["<<A>> a, b", "a"], ["a", "a, b"], ["<<A>> a", "<<A>> a"]]
    whole = [[True, True], [True, True], [True, False]]
    values = specific([{**row, "answers": a, "whole": w} for row, a, w in zip(asked, answers, whole, strict=True)])
    # Own constraints less the share of the two other prompts; the last answer was cut.
    assert values == [[1 - 0, 0 - 1 / 2], [1 - 0, 0 - 0], [1 - 1, 0 - 0]]


def test_what_a_text_that_knows_nothing_gets_of_the_reported_prompts():
    """docs/RESULTS.md has these beside the models' numbers."""
    reported = read_prompts("test")[100:]
    shares = [
        sum(all(followed(row["constraints"], text or row["prompt"])) for row in reported)
        for text in (BOILERPLATE, None)
    ]
    assert len(reported) == 200 and shares == [84, 39]


def test_constraints_are_counted_by_family():
    title, comma = ({"id": name} for name in ("detectable_format:title", "punctuation:no_comma"))
    rows = [
        {"constraints": [title, comma], "followed": [[True, False], [True, True]]},
        {"constraints": [comma], "followed": [[False], [False]]},
    ]
    assert by_family(rows) == {"constraints_title": 100.0, "constraints_no_comma": 25.0}
    assert [name.partition(":")[2] for name in DRAWN] == list(FAMILIES)
