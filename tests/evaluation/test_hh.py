"""HH win rates against scoring every sequence on its own, without packing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmipo.errors import EvaluationError
from rmipo.evaluation.hh import BENCHMARK
from rmipo.reporting.results import Result, deviations
from rmipo.training.loading import LoadingError
from tests.helpers.rows import write
from tests.helpers.tiny_model import naive_scores, write_model


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
    assert result["settings"]["other_pairs"] == sorted(
        str(tmp_path / name) for name in subsets
    )  # not Anthropic's: a trial
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
