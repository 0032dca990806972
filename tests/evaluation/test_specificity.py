"""Specificity: the numbers against one sequence at a time, and what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS, specificity
from rmipo.evaluation.statistics import repeated_share
from rmipo.generation.oracles import Likelihood
from tests.helpers.rows import user
from tests.helpers.tiny_model import write_model
from tests.references.padded import padded_token_logps


def test_what_cannot_be_scored_is_named(tmp_path):
    write_model(tmp_path)
    prompts = [[user(" ".join(["w1"] * count))] for count in (1, 100)]
    with pytest.raises(EvaluationError, match="144 tokens"):
        specificity.score_answers(Likelihood(tmp_path, "float32"), prompts, [" ".join(["w2"] * 40), "w3"])


def test_benchmark_against_one_sequence_at_a_time(tmp_path):
    initial, model = tmp_path / "initial", tmp_path / "model"
    write_model(initial, seed=0)
    write_model(model, seed=1)
    questions = [f"w{i} w{2 * i}" for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    generation = {"temperature": 1.0, "max_new_tokens": 6, "dtype": "float32", "engine": "transformers"}
    settings = {"prompts": str(tmp_path / "prompts.jsonl"), "initial": str(initial), "generation": generation}
    result = BENCHMARKS["specificity"].run(model, tmp_path, settings)
    rows = [json.loads(line) for line in (tmp_path / "specificity.jsonl").read_text().splitlines()]

    tokenizer = AutoTokenizer.from_pretrained(initial)
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in (("0", initial), ("1", model))}

    def logp(name: str, context: list[str], answer: str) -> float:
        texts = tuple(tokenizer.convert_tokens_to_ids(words) for words in (context, [*answer.split(), "</s>"]))
        with torch.no_grad():
            return padded_token_logps(models[name], [texts])[0].double().sum().item()

    def asked(question: str) -> list[str]:
        return ["<s>", "<user>", *question.split(), "<assistant>"]

    expected = []
    for row in rows:
        under = {q: logp("0", asked(q), row["answer"]) for q in questions}
        own = under[row["prompt"][0]["content"]]
        assert row["own"] == (own == max(under.values()))
        assert row["pmi"] == pytest.approx(own - math.log(sum(map(math.exp, under.values())) / 5), abs=1e-4)
        assert row["prior_pmi"] == pytest.approx(own - logp("0", ["<s>", "<assistant>"], row["answer"]), abs=1e-4)
        kl = logp("1", asked(row["prompt"][0]["content"]), row["answer"]) - own
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        expected.append(kl)
    assert result["metrics"]["kl_initial"] == pytest.approx(sum(expected) / 5, abs=1e-4)
    assert result["metrics"]["pmi_bound"] == math.log(5)
    assert result["metrics"]["specificity"] == 20 * sum(row["own"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    assert tokens == sum(len(row["answer"].split()) + 1 for row in rows)
    for name in ("pmi", "prior_pmi"):  # sums over sums: a long answer counts by its tokens
        assert result["metrics"][f"{name}_token"] == pytest.approx(sum(row[name] for row in rows) / tokens)
    assert result["per_prompt"]["kl_initial"] == pytest.approx(expected, abs=1e-4)
    assert result["per_prompt"]["specificity"] == [100.0 * row["own"] for row in rows]
    frozen, same = Likelihood(initial, "float32"), [user("w1 w2")]
    twice = specificity.score_answers(frozen, [same, same], ["w3", "w4"])
    assert not twice["own"].any()  # another prompt makes the answer as likely
    assert twice["pmi"].tolist() == pytest.approx([0, 0], abs=1e-6)
    itself = BENCHMARKS["specificity"].run(model, tmp_path, settings | {"initial": str(model)})
    assert itself["metrics"]["kl_initial"] == 0


def test_repeated_share_by_hand():
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: five 4-grams, the last a repeat of the first.
    assert repeated_share([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated_share([[7] * 10, [1, 2, 3, 4, 5, 6]]) == pytest.approx(6 / 10)
    assert repeated_share([[1, 2, 3], []]) == 0
