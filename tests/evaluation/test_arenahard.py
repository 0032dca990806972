"""Arena-Hard's answers in its repository's format, as gen_judgment.py reads them: by uid, messages[-1].content.answer."""

import json

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import arenahard
from tests.helpers.tiny_model import write_model


def test_answers_in_the_format_of_its_repository(tmp_path):
    model = tmp_path / "tiny/rmipo"
    model.mkdir(parents=True)
    write_model(model)
    questions = [{"uid": f"u{i}", "category": "hard_prompt", "prompt": f"w{i} w{i + 1}"} for i in range(5)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    generation = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 6, "temperature": 1.0}
    settings = {"questions": str(tmp_path / "question.jsonl"), "generation": generation}
    assert arenahard.run(model, tmp_path / "eval", settings) is None
    lines = (tmp_path / "eval/arenahard/model_answer/tiny-rmipo.jsonl").read_text().splitlines()
    (kept,) = (model / "eval/answers").iterdir()
    answers = [json.loads(line)["output"] for line in kept.read_text().splitlines()[1:]]
    rows = [json.loads(line) for line in lines]
    assert [row["uid"] for row in rows] == ["u0", "u1", "u2", "u3", "u4"]
    assert [row["messages"][-1]["content"]["answer"] for row in rows] == answers and len(set(answers)) > 1
    assert {row["model"] for row in rows} == {"tiny-rmipo"}


def test_questions_that_cannot_be_had(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"With a network: .venv/bin/hf download lmarena-ai/arena-hard-auto data/.*dataset$"
    ):
        arenahard.run(tmp_path, tmp_path, {})
