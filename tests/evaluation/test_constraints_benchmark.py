"""The benchmark of short tasks with constraints on a small model: what is sampled, and what is made of it."""

import json
import statistics

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from rmipo.constraints import prompts as prompts_module
from rmipo.constraints.instructions import DRAWN, answered, followed, solved
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.constraints import BOILERPLATE, FAMILIES, by_family, fixed_text
from tests.helpers.tiny_model import write_model

GENERATION = {"temperature": 1.0, "max_new_tokens": 12, "dtype": "float32", "engine": "transformers"}
COMMA, TITLE = ({"id": name, "arguments": {}} for name in ("punctuation:no_comma", "detectable_format:title"))
TASKS = [
    {"prompt": f"w{i} w{2 * i}", "keywords": [f"w{i}{n}" for n in range(5)], "subject": ["w"], "constraints": [asked]}
    for i, asked in enumerate([COMMA] * 7 + [TITLE] * 2)
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The benchmark with `settings` on tasks that a small model solves by chance: its result and the rows it wrote."""
    monkeypatch.setattr(prompts_module, "read_prompts", {"test": TASKS}.get)
    write_model(tmp_path)

    def call(**settings):
        result = BENCHMARKS["constraints"].run(tmp_path, tmp_path / "eval", {"generation": GENERATION, **settings})
        return result, [json.loads(line) for line in (tmp_path / "eval/constraints.jsonl").read_text().splitlines()]

    return call


def test_shares_of_answers_that_solve_answer_and_follow(run, tmp_path):
    result, rows = run(answers=8)
    metrics = result["metrics"]
    assert len(rows) == 9 and all(len(row["answers"]) == 8 for row in rows)
    assert sum(len(set(row["answers"])) > 4 for row in rows) > 6  # one seed for each answer
    (path,) = (tmp_path / "eval/answers").glob("*.jsonl")
    sampled = sorted((json.loads(line) for line in path.read_text().splitlines()[1:]), key=lambda row: row["key"])
    ends = [answer["finish"] != "length" for answer in sampled]
    assert [answer for row in rows for answer in row["answers"]] == [answer["output"] for answer in sampled]
    expected = {"constraints_solved": [], "constraints_answered": [], "constraints_all": []}
    for number, row in enumerate(rows):
        whole = ends[8 * number : 8 * number + 8]
        good = [solved(row, answer) and ended for answer, ended in zip(row["answers"], whole, strict=True)]
        expected["constraints_solved"].append(100 * statistics.mean(good))
        expected["constraints_answered"].append(100 * statistics.mean(answered(row, a) for a in row["answers"]))
        follows = [all(followed(row["constraints"], answer)) for answer in row["answers"]]
        expected["constraints_all"].append(100 * statistics.mean(follows))
    assert len({statistics.mean(values) for values in expected.values()}) == 3 and 0 < sum(ends) < 72
    assert result["per_prompt"] == expected
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(statistics.mean(values))
        # The error is over prompts.
        assert metrics[f"{name}_standard_error"] == pytest.approx(statistics.stdev(values) / 3)
    assert metrics["constraints_cut"] == pytest.approx(100 * (72 - sum(ends)) / 72)
    assert by_family(rows).items() <= metrics.items()
    fixed = fixed_text(TASKS)
    assert metrics["constraints_fixed"] == pytest.approx(100 / 9 * sum(solved(row, fixed) for row in TASKS))
    assert metrics["constraints_repeated"] == pytest.approx(100 / 9 * sum(solved(row, row["prompt"]) for row in TASKS))


def test_the_first_prompts_are_those_after_the_ones_left_out(run):
    _, rows = run(first_n=3, skip_n=2)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in TASKS[2:5]]


def test_the_fixed_text_solves_more_than_boilerplate_and_few_tasks():
    """docs/RESULTS.md has its share beside the models'."""
    reported, boilerplate = prompts_module.read_prompts("test")[100:], "\n".join(BOILERPLATE)
    counts = [sum(solved(row, text) for row in reported) for text in (fixed_text(reported), boilerplate)]
    assert len(reported) == 473 and counts == [30, 0]
    assert sum(all(followed(row["constraints"], boilerplate)) for row in reported) == 311


def test_constraints_are_counted_by_family():
    title, comma = ({"id": name} for name in ("detectable_format:title", "punctuation:no_comma"))
    rows = [
        {"constraints": [title, comma], "followed": [[True, False], [True, True]]},
        {"constraints": [comma], "followed": [[False], [False]]},
    ]
    assert by_family(rows) == {"constraints_title": 100.0, "constraints_no_comma": 25.0}
    assert [name.partition(":")[2] for name in DRAWN] == list(FAMILIES)
