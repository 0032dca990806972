"""Win rates by a reward model that the test makes, against scoring every dialogue on its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import reward
from rmipo.evaluation.statistics import bootstrap, standard_error, wins
from rmipo.generation.oracles import RewardModelOracle
from tests.helpers.reward_models import reward_alone, write_reward_model
from tests.helpers.tiny_model import write_model

PROMPTS = 12
GENERATION = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 8, "temperature": 1.0}


@pytest.fixture
def outputs(tmp_path) -> Path:
    for seed, method in enumerate(("initial", "dpo", "rmipo")):
        write_model(tmp_path / method, seed)
    write_reward_model(tmp_path / "scorer/model")
    rows = [{"instruction": f"w{i} w{(2 * i) % 20}", "output": "w1"} for i in range(PROMPTS)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    return tmp_path


def evaluate(outputs: Path, method: str, **changes) -> dict:
    settings = {"generation": GENERATION, "model": str(outputs / "scorer/model"), "dtype": "float32", "batch_size": 5}
    settings["reference"] = str(outputs / "prompts.json")
    return reward.run(outputs / method, outputs / method / "eval", settings | changes)


def test_win_rates_against_scoring_one_by_one(outputs, monkeypatch):
    alone = evaluate(outputs, "initial")["metrics"]
    assert not any(name.startswith("reward_wr") for name in alone)  # nobody else has answered
    evaluate(outputs, "dpo")
    metrics = evaluate(outputs, "rmipo")["metrics"]
    rewards = {}
    for method in ("initial", "dpo", "rmipo"):
        answers = [json.loads(line)["output"] for line in answers_of(outputs, method)[1][1:]]
        prompts = [row["instruction"] for row in json.loads((outputs / "prompts.json").read_text())]
        rewards[method] = [reward_alone(outputs / "scorer/model", p, a) for p, a in zip(prompts, answers, strict=True)]
    assert metrics["reward"] == pytest.approx(sum(rewards["rmipo"]) / PROMPTS, abs=1e-6)
    assert evaluate(outputs, "rmipo")["per_prompt"]["reward"] == pytest.approx(rewards["rmipo"], abs=1e-6)
    assert alone["reward"] == pytest.approx(sum(rewards["initial"]) / PROMPTS, abs=1e-6)
    for other in ("initial", "dpo"):
        won = sum(a > b for a, b in zip(rewards["rmipo"], rewards[other], strict=True))
        tied = sum(a == b for a, b in zip(rewards["rmipo"], rewards[other], strict=True))
        key = f"reward_wr_vs_{other}"
        assert metrics[key] == pytest.approx(100 * (won + tied / 2) / PROMPTS)
        assert metrics[f"{key}_low"] <= metrics[key] <= metrics[f"{key}_high"]
    assert 0 < metrics["reward_wr_vs_dpo"] < 100
    monkeypatch.chdir(outputs)  # named from there, the model is no other one
    assert evaluate(outputs.relative_to(Path.cwd()), "rmipo")["metrics"] == metrics  # deterministic


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


def test_equal_answers_are_ties_whatever_padding_does_to_their_rewards(outputs, monkeypatch):
    batch, calls = RewardModelOracle.batch, []

    def uneven(self, sequences):
        """Beside other answers, the last bits of a reward are others."""
        calls.append(1)
        return [reward + 1e-6 * len(calls) for reward in batch(self, sequences)]

    monkeypatch.setattr(RewardModelOracle, "batch", uneven)
    evaluate(outputs, "dpo")
    evaluate(outputs, "rmipo")
    ours, (header, *_) = answers_of(outputs, "rmipo")
    ours.write_text(header + "".join(answers_of(outputs, "dpo")[1][1:]))
    assert evaluate(outputs, "rmipo")["metrics"]["reward_wr_vs_dpo"] == 50


def test_unfinished_answers_of_others_are_left_out_and_those_of_weights_that_are_gone_refused(outputs):
    evaluate(outputs, "dpo")
    file, lines = answers_of(outputs, "dpo")
    file.write_text("".join(lines[:5]))
    assert not any("dpo" in name for name in evaluate(outputs, "rmipo")["metrics"])
    file.write_text("".join(lines))
    write_model(outputs / "dpo", 7)  # trained again
    with pytest.raises(EvaluationError, match=r"dpo/eval/answers/alpacaeval-\w+\.jsonl has answers of other weights"):
        evaluate(outputs, "rmipo")


def test_statistics_by_hand():
    assert wins([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]).tolist() == [1.0, 0.0, 0.5]
    assert standard_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((14 / 3) ** 0.5 / 2)
    values = np.repeat([0.0, 1.0], [30, 70])
    interval = bootstrap(values)
    # The mean of 100 draws with p = 0.7: standard error 0.0458, 95% of it within 1.96 of these.
    assert interval.mean == 0.7 and interval.standard_error == pytest.approx(0.0458, abs=0.002)
    assert (interval.low, interval.high) == pytest.approx((0.61, 0.79), abs=0.011)
    assert bootstrap(values) == interval
