"""Benchmarks that score: HH win rates, rewards and specificity, against one sequence at a time, without packing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS, reward, specificity
from rmipo.evaluation.hh import BENCHMARK
from rmipo.evaluation.statistics import bootstrap, repeated_share, standard_error, wins
from rmipo.generation.oracles import Likelihood
from rmipo.reporting.results import Result, deviations
from rmipo.training.loading import LoadingError
from tests.helpers.rows import user, write
from tests.helpers.tiny_model import naive_scores, reward_alone, write_model, write_reward_model
from tests.references.padded import padded_token_logps


def write_pairs(folder, offset: int) -> list[dict]:
    pairs = []
    for i in range(offset, offset + 12):
        words = [f"w{(7 * i + 3 * k) % 20}" for k in range(12)]
        response = {"chosen": " ".join(words[2 : 4 + i % 4]), "rejected": " ".join(words[6 : 9 + i % 3])}
        pairs.append({"prompt": " ".join(words[:2]), **response})
    write(folder / "test.jsonl", pairs)
    return pairs


def share(won: torch.Tensor) -> float:
    return 100 * won.double().mean().item()


def test_run_against_unpacked_scoring(tmp_path):
    model = tmp_path / "model"
    write_model(model)
    subsets = {"helpful": write_pairs(tmp_path / "helpful", 0), "harmless": write_pairs(tmp_path / "harmless", 100)}
    settings = {name: {"dataset_name": str(tmp_path / name)} for name in subsets}

    result = BENCHMARK.run(model, tmp_path / "eval", settings | {"dtype": "float32"})

    metrics = result["metrics"]
    folders = sorted(str(tmp_path / name) for name in subsets)
    assert result["settings"]["other_pairs"] == folders  # not Anthropic's: a trial
    path = tmp_path / "hh.json"
    (trial,) = deviations(Result(path, "tiny", "hh", metrics, result["versions"], result["settings"]))
    assert "TRIAL" in trial and str(tmp_path / "helpful") in trial
    assert result["settings"]["pairs_sha256"].keys() == subsets.keys()
    assert len(set(result["settings"]["pairs_sha256"].values())) == 2  # other pairs, another hash
    for name, pairs in subsets.items():
        naive = naive_scores(model, pairs)
        saved = torch.load(tmp_path / "eval" / f"hh_{name}.pt")
        assert saved["row"].tolist() == list(range(12))
        for column, values in naive.items():
            assert torch.allclose(saved[column].double(), values, atol=1e-4), column
        averages = {side: naive[f"{side}_logps"] / naive[f"{side}_lengths"] for side in ("chosen", "rejected")}
        assert metrics[f"hh_{name}"] == pytest.approx(share(averages["chosen"] > averages["rejected"]))
        assert metrics[f"hh_{name}_sum"] == share(naive["chosen_logps"] > naive["rejected_logps"])
        assert result["per_prompt"][f"hh_{name}"] == (100.0 * (averages["chosen"] > averages["rejected"])).tolist()
        assert metrics[f"hh_{name}_pairs"] == 12
    rates = [metrics[f"hh_{name}{suffix}"] for name in subsets for suffix in ("", "_sum")]
    assert len(set(rates)) > 1 and all(0 < rate < 100 for rate in rates)
    assert metrics["hh_average"] == (metrics["hh_helpful"] + metrics["hh_harmless"]) / 2
    rate = metrics["hh_helpful"] / 100
    assert metrics["hh_helpful_standard_error"] == pytest.approx(100 * (rate * (1 - rate) / 11) ** 0.5)
    squares = [metrics[f"hh_{name}_standard_error"] ** 2 for name in subsets]
    assert metrics["hh_average_standard_error"] == pytest.approx(sum(squares) ** 0.5 / 2)


def test_one_subset_alone_has_no_average(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "harmless", 0)
    with (tmp_path / "harmless/test.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1", "chosen": "w2", "rejected": ""}) + "\n")  # can't be scored
        file.write(json.dumps({"prompt": "w1 " * 30, "chosen": "w2", "rejected": "w3"}) + "\n")
    settings = {"harmless": {"dataset_name": str(tmp_path / "harmless")}, "max_prompt_length": 20}
    metrics = BENCHMARK.run(tmp_path / "model", tmp_path / "eval", settings)["metrics"]
    names = ("", "_sum", "_pairs", "_dropped", "_cut", "_standard_error")
    assert set(metrics) == {f"hh_harmless{name}" for name in names}
    assert [metrics[f"hh_harmless_{name}"] for name in ("pairs", "dropped", "cut")] == [13, 1, 1]
    limited = BENCHMARK.run(tmp_path / "model", tmp_path / "eval", settings | {"limit": 5})
    scores = torch.load(tmp_path / "eval/hh_harmless.pt", weights_only=True)
    assert limited["metrics"]["hh_harmless_pairs"] == 5 and scores["row"].tolist() == list(range(5))


def test_nothing_named_means_the_hubs_pairs(tmp_path):
    with pytest.raises(ValueError, match="Anthropic/hh-rlhf"):
        BENCHMARK.run(tmp_path / "no-model", tmp_path, {})


def test_a_model_that_cannot_score_the_pairs_has_no_win_rate(tmp_path):
    folder = write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs", 0)
    settings = {"helpful": {"dataset_name": str(tmp_path / "pairs")}}
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= torch.nan  # every comparison is False, a win rate of 0%
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="chosen_logps"):
        BENCHMARK.run(folder, tmp_path / "eval", settings)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadingError, match="3 positions"):  # rotary ones would score beyond in silence
        BENCHMARK.run(folder, tmp_path / "eval", settings)


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


def test_rewards_are_not_taken_from_another_reward_model_or_other_answers(outputs):
    first = evaluate(outputs, "rmipo")
    write_reward_model(outputs / "scorer/model", seed=1)
    second = evaluate(outputs, "rmipo")
    assert first["metrics"]["reward"] != second["metrics"]["reward"]
    assert first["settings"]["model_fingerprint"] != second["settings"]["model_fingerprint"]
    (file,) = (outputs / "rmipo/eval/answers").glob("*.jsonl")
    header, answer, *lines = file.read_text().splitlines(keepends=True)
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
