"""Rewards by a reward model that the test makes, against scoring every dialogue on its own; and their win rates."""

import json
from pathlib import Path

import numpy as np
import pytest

from rmipo.evaluation import reward
from rmipo.evaluation.statistics import bootstrap, standard_error, wins
from tests.helpers.tiny_model import reward_alone, write_model, write_reward_model

PROMPTS = 12
GENERATION = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 8, "temperature": 1.0}


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_model(tmp_path / "rmipo", 2)
    write_reward_model(tmp_path / "scorer/model")
    rows = [{"instruction": f"w{i} w{(2 * i) % 20}", "output": "w1"} for i in range(PROMPTS)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    return tmp_path


def evaluate(outputs: Path, method: str, **changes) -> dict:
    settings = {"generation": GENERATION, "model": str(outputs / "scorer/model"), "dtype": "float32"}
    settings["reference"] = str(outputs / "prompts.json")
    return reward.BENCHMARK.run(outputs / method, outputs / method / "eval", settings | changes)


def test_rewards_against_scoring_one_by_one(outputs, monkeypatch):
    result = evaluate(outputs, "rmipo")
    (file,) = (outputs / "rmipo/eval/answers").glob("*.jsonl")
    answers = [json.loads(line)["output"] for line in file.read_text().splitlines()[1:]]
    prompts = [row["instruction"] for row in json.loads((outputs / "prompts.json").read_text())]
    alone = [reward_alone(outputs / "scorer/model", p, a) for p, a in zip(prompts, answers, strict=True)]
    assert result["per_prompt"]["reward"] == pytest.approx(alone, abs=1e-6)
    assert result["metrics"]["reward"] == pytest.approx(sum(alone) / PROMPTS, abs=1e-6)
    monkeypatch.chdir(outputs)
    assert evaluate(outputs.relative_to(Path.cwd()), "rmipo")["metrics"] == result["metrics"]  # deterministic


def answers_of(outputs, method):
    (file,) = (outputs / method / "eval/answers").glob("*.jsonl")
    return file, file.read_text().splitlines(keepends=True)


def test_rewards_are_not_taken_from_another_reward_model_or_other_answers(outputs):
    first = evaluate(outputs, "rmipo")
    write_reward_model(outputs / "scorer/model", seed=1)
    second = evaluate(outputs, "rmipo")
    assert first["metrics"]["reward"] != second["metrics"]["reward"]
    assert first["settings"]["model_fingerprint"] != second["settings"]["model_fingerprint"]
    file, (header, answer, *lines) = answers_of(outputs, "rmipo")
    changed = json.loads(answer) | {"output": "w1 w2 w3 w4 w5 w6 w7"}
    file.write_text("".join([header, json.dumps(changed) + "\n", *lines]))
    assert abs(evaluate(outputs, "rmipo")["metrics"]["reward"] - second["metrics"]["reward"]) > 1e-4


def test_statistics_by_hand():
    assert wins([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]).tolist() == [1.0, 0.0, 0.5]
    assert standard_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((14 / 3) ** 0.5 / 2)
    values = np.repeat([0.0, 1.0], [30, 70])
    interval = bootstrap(values)
    # The mean of 100 draws with p = 0.7: standard error 0.0458, 95% of it within 1.96 of these.
    assert interval.mean == 0.7 and interval.standard_error == pytest.approx(0.0458, abs=0.002)
    assert (interval.low, interval.high) == pytest.approx((0.61, 0.79), abs=0.011)
    assert bootstrap(values) == interval
