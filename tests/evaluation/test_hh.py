"""HH win rates against scoring every sequence on its own, without packing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmipo.errors import EvaluationError
from rmipo.evaluation.hh import run, won
from rmipo.evaluation.pair_scores import native_rewards, needs_reference, score_model
from rmipo.objectives import OBJECTIVES
from rmipo.reporting.provenance import deviations
from rmipo.reporting.results import Result
from rmipo.training.loading import LoadingError
from tests.helpers.rows import write
from tests.helpers.tiny_model import naive_scores, write_model

SCORES = {
    "chosen_logps": torch.tensor([-4.0, -9.0, -2.0, -6.0]),
    "rejected_logps": torch.tensor([-5.0, -4.0, -2.0, -3.0]),
    "chosen_lengths": torch.tensor([4.0, 9.0, 2.0, 8.0]),  # per token: -1, -1, -1, -0.75
    "rejected_lengths": torch.tensor([4.0, 2.0, 2.0, 2.0]),  # per token: -1.25, -2, -1, -1.5
}


def test_win_rates_and_native_rewards_by_hand():
    rewards = (torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    shares = {end: share(values) for end, values in won(SCORES, rewards).items()}
    assert shares == {"": 75.0, "_sum": 25.0, "_native": 50.0}
    assert won(SCORES, None).keys() == {"", "_sum"}
    reference = {"ref_chosen_logps": torch.tensor([-5.0, -9.0, -1.0, -5.0])}
    reference["ref_rejected_logps"] = torch.tensor([-5.0, -5.0, -2.5, -3.0])
    per_token = torch.tensor([True, True, False, True])
    summed = torch.tensor([True, False, False, False])
    log_ratio = torch.tensor([True, False, False, False])  # 1 > 0, 0 > 1, -1 > 0.5, -1 > 0
    expected = {
        **dict.fromkeys(("rmipo", "simpo", "simper"), per_token),
        "alpha-dpo": torch.tensor([True] * 4),  # its reward subtracts a share of the log-ratio, which breaks the tie
        **dict.fromkeys(("slic", "cpo"), summed),
        **dict.fromkeys(("dpo", "kto", "ipo", "beta-dpo", "epsilon-dpo"), log_ratio),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, order in expected.items():
        scores = SCORES | (reference if needs_reference({"name": name}) else {})
        chosen, rejected = native_rewards({"name": name}, scores)
        assert torch.equal(chosen > rejected, order), name
    chosen, rejected = native_rewards({"name": "rmipo", "prior_model": "initial"}, SCORES)
    assert torch.equal(chosen > rejected, per_token)


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
    model, reference = tmp_path / "dpo", tmp_path / "reference"
    for seed, folder in enumerate((model, reference)):
        write_model(folder, seed)
    (reference / "chat_template.jinja").unlink()  # as where the recipe brings the template
    record = {"objective": {"name": "dpo", "beta": 0.1}, "recipe": {"model_name_or_path": str(reference)}}
    (model / "run.json").write_text(json.dumps(record))
    subsets = {"helpful": write_pairs(tmp_path / "helpful", 0), "harmless": write_pairs(tmp_path / "harmless", 100)}
    settings = {name: {"dataset_name": str(tmp_path / name)} for name in subsets}

    result = run(model, tmp_path / "eval", settings | {"dtype": "float32"})

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
        naive, ref = naive_scores(model, pairs), naive_scores(reference, pairs)
        saved = torch.load(tmp_path / "eval" / f"hh_{name}.pt")
        assert saved["row"].tolist() == list(range(12))
        for column, values in naive.items():
            assert torch.allclose(saved[column].double(), values, atol=1e-4), column
        averages = {side: naive[f"{side}_logps"] / naive[f"{side}_lengths"] for side in ("chosen", "rejected")}
        ratios = {side: naive[f"{side}_logps"] - ref[f"{side}_logps"] for side in ("chosen", "rejected")}
        assert metrics[f"hh_{name}"] == share(averages["chosen"] > averages["rejected"])
        assert metrics[f"hh_{name}_sum"] == share(naive["chosen_logps"] > naive["rejected_logps"])
        assert metrics[f"hh_{name}_native"] == share(ratios["chosen"] > ratios["rejected"])
        assert result["per_prompt"][f"hh_{name}"] == (100.0 * (averages["chosen"] > averages["rejected"])).tolist()
        assert metrics[f"hh_{name}_pairs"] == 12
    rates = [metrics[f"hh_{name}{suffix}"] for name in subsets for suffix in ("", "_sum", "_native")]
    assert len(set(rates)) > 2 and all(0 < rate < 100 for rate in rates)
    assert metrics["hh_average"] == (metrics["hh_helpful"] + metrics["hh_harmless"]) / 2
    rate = metrics["hh_helpful"] / 100
    assert metrics["hh_helpful_standard_error"] == pytest.approx(100 * (rate * (1 - rate) / 11) ** 0.5)
    squares = [metrics[f"hh_{name}_standard_error"] ** 2 for name in subsets]
    assert metrics["hh_average_standard_error"] == pytest.approx(sum(squares) ** 0.5 / 2)


def test_the_reference_is_of_the_recipes_revision(tmp_path, monkeypatch):
    model, scored = tmp_path / "dpo", []
    write_model(model)
    recipe = {"model_name_or_path": "owner/base", "model_revision": "abc"}
    (model / "run.json").write_text(json.dumps({"objective": {"name": "dpo"}, "recipe": recipe}))
    write_pairs(tmp_path / "helpful", 0)

    def score(folder, pairs, *, revision="main", **options):
        scored.append((folder, revision))
        return score_model(model, pairs, **options)

    monkeypatch.setattr("rmipo.evaluation.pair_scores.score_model", score)
    run(model, tmp_path / "eval", {"helpful": {"dataset_name": str(tmp_path / "helpful")}})
    assert scored == [(model, "main"), ("owner/base", "abc")]


def test_one_subset_alone_has_no_average(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "harmless", 0)
    with (tmp_path / "harmless/test.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1", "chosen": "w2", "rejected": ""}) + "\n")  # can't be scored
        file.write(json.dumps({"prompt": "w1 " * 30, "chosen": "w2", "rejected": "w3"}) + "\n")
    settings = {"harmless": {"dataset_name": str(tmp_path / "harmless")}, "max_prompt_length": 20}
    metrics = run(tmp_path / "model", tmp_path / "eval", settings)["metrics"]
    names = ("", "_sum", "_pairs", "_dropped", "_cut", "_standard_error")
    assert set(metrics) == {f"hh_harmless{name}" for name in names}
    assert [metrics[f"hh_harmless_{name}"] for name in ("pairs", "dropped", "cut")] == [13, 1, 1]
    limited = run(tmp_path / "model", tmp_path / "eval", settings | {"limit": 5})
    scores = torch.load(tmp_path / "eval/hh_harmless.pt", weights_only=True)
    assert limited["metrics"]["hh_harmless_pairs"] == 5 and scores["row"].tolist() == list(range(5))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "Anthropic/hh-rlhf"),  # what is scored if nothing is named
        ({"harmles": {}}, "harmles"),
        ({"harmless": {"dataset_name": "no/such/place/"}}, "no/such/place"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        run(tmp_path / "no-model", tmp_path, settings)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (
            {"max_position_embeddings": 3},
            LoadingError,
            "3 positions",
        ),  # rotary embeddings would score beyond in silence
        ({"vocab_size": 24}, LoadingError, "embeddings"),
        ({}, EvaluationError, "chosen_logps"),  # NaN: every comparison is False, a win rate of 0%
    ],
)
def test_a_model_that_cannot_score_the_pairs_has_no_win_rate(tmp_path, change, error, named):
    folder = write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs", 0)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1 if change else torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=named):
        run(folder, tmp_path / "eval", {"helpful": {"dataset_name": str(tmp_path / "pairs")}})
