"""Per-pair arrays of Figures 3, 6 and 8 from a saved model, against unpacked scoring and the formulas by hand."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rmipo.reporting.pair_arrays import gamma_readings, judge_differences, reward_differences, run_scores, summarize
from rmipo.reporting.results import ReportError, load_run
from tests.helpers.programs import run_here
from tests.helpers.rows import write
from tests.helpers.tiny_model import naive_scores, write_model

OBJECTIVES = {
    "rmipo": {"name": "rmipo", "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6},
    "simpo": {"name": "simpo", "beta": 4.0, "gamma": 1.0},
    "simper": {"name": "simper"},
}


def write_pairs(folder: Path) -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(20)}" for _ in range(count))

    pairs = []
    for _ in range(20):
        pair = {"prompt": words(3), "chosen": words(draw.randint(2, 6)), "rejected": words(draw.randint(2, 6))}
        pairs.append(pair | {"score_chosen": draw.randint(5, 9), "score_rejected": draw.randint(1, 4)})
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", pairs)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_pairs(folder / "pairs")
    for seed, (method, objective) in enumerate(OBJECTIVES.items()):
        run = folder / "tiny" / method
        write_model(run, seed)
        recipe = {"dataset_name": str(folder / "pairs"), "max_length": 64, "max_prompt_length": 32}
        (run / "run.json").write_text(json.dumps({"finished": True, "objective": objective, "recipe": recipe}))
    return folder


def pairs_of(outputs: Path) -> list[dict]:
    return [json.loads(line) for line in (outputs / "pairs" / "test.jsonl").read_text().splitlines()]


def test_rewards_and_judge_scores_of_figure6(outputs):
    run, pairs = load_run(outputs, "tiny", "simpo"), pairs_of(outputs)
    values, rows = reward_differences(run, "test", max_pairs=100)
    naive = naive_scores(run.folder, pairs)
    averages = [naive[f"{side}_logps"] / naive[f"{side}_lengths"] for side in ("chosen", "rejected")]
    assert rows == list(range(20))
    assert torch.allclose(torch.from_numpy(values).double(), 4.0 * (averages[0] - averages[1]), atol=1e-4)
    differences = judge_differences(run, "test", [3, 0])
    assert differences.tolist() == [pairs[i]["score_chosen"] - pairs[i]["score_rejected"] for i in (3, 0)]


def test_gamma_of_figure8_by_three_formulas(outputs):
    run = load_run(outputs, "tiny", "rmipo")
    readings = gamma_readings(run, "train", max_pairs=100)
    naive = naive_scores(run.folder, pairs_of(outputs))

    def margin(pmi: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.3 + 1.3 * torch.exp(-(pmi["chosen"] - pmi["rejected"]).clamp(min=0))

    summed = {side: naive[f"{side}_logps"] - naive[f"prior_{side}_logps"] for side in ("chosen", "rejected")}
    per_token = {side: value / naive[f"{side}_lengths"] for side, value in summed.items()}
    assert np.allclose(readings["per token, as in the recipe"].gamma, margin(per_token), atol=1e-4)
    assert np.allclose(readings["summed, as printed"].gamma, margin(summed), atol=1e-3)
    release = naive_scores(run.folder, pairs_of(outputs), release=True)
    released = {}
    for side in ("chosen", "rejected"):
        logps, prior, length = (release[name] for name in (f"{side}_logps", f"prior_{side}_logps", f"{side}_lengths"))
        released[side] = logps / length - prior / (length - 1)
    assert np.allclose(readings["released code"].gamma, margin(released), atol=1e-4)
    assert np.abs(readings["released code"].gamma - readings["per token, as in the recipe"].gamma).max() > 1e-3
    table = summarize(readings, 0.3, 1.6)
    delta = (per_token["chosen"] - per_token["rejected"]).double().numpy()
    row = table.loc["per token, as in the recipe"]
    assert row["delta_pmi mean"] == pytest.approx(delta.mean(), abs=1e-4)
    assert row["std"] == pytest.approx(delta.std(ddof=1), abs=1e-4)
    assert row["median"] == pytest.approx(np.median(delta), abs=1e-4)
    assert row["chosen higher"] == np.mean(delta > 0) == pytest.approx(1 - row["at gamma_max"])
    lengths = (naive["chosen_lengths"] - naive["rejected_lengths"]).numpy()
    assert row["correlation with length difference"] == pytest.approx(np.corrcoef(delta, lengths)[0, 1], abs=1e-3)
    extremes = pd.DataFrame({"delta_pmi": [-9.0, 9.0, 4.0, 0.5], "gamma": [1.6, 0.3, 0.3095, 0.8]})
    extremes["length_difference"] = range(4)
    ends = summarize({"a": extremes}, 0.3, 1.6).loc["a"]
    assert (ends["at gamma_max"], ends["within 0.01 of gamma_min"], ends["mean gamma"]) == (0.25, 0.5, 0.752375)


def with_objective(run, **changes):
    return dataclasses.replace(run, record=run.record | {"objective": run.objective | changes})


def test_figure8_is_of_the_runs_own_schedule_and_prior(outputs):
    run = with_objective(load_run(outputs, "tiny", "rmipo"), schedule="linear", span=0.5, prior_context="bos")
    readings = gamma_readings(run, "train", max_pairs=100)
    assert list(readings) == ["per token, as in the recipe", "summed, as printed", "released code"]
    scores, _ = run_scores(run, "train", 100, prior_context="bos")
    chosen, rejected = (
        (scores[f"{s}_logps"] - scores[f"prior_{s}_logps"]) / scores[f"{s}_lengths"] for s in ("chosen", "rejected")
    )
    expected = 0.3 + 1.3 * (1 - ((chosen - rejected).clamp(min=0) / 0.5).clamp(max=1))
    assert np.allclose(readings["per token, as in the recipe"].gamma, expected, atol=1e-6)
    release = gamma_readings(with_objective(load_run(outputs, "tiny", "rmipo"), fidelity="release"), "train", 100)
    assert list(release) == ["per token", "summed, as printed", "released code, as in the recipe"]


def test_figure8_refuses_runs_whose_gamma_does_not_follow_delta_pmi(outputs):
    run = load_run(outputs, "tiny", "rmipo")
    changes = ({"target": "beta"}, {"signal": "loglik"})
    for wrong in (load_run(outputs, "tiny", "simpo"), *(with_objective(run, **change) for change in changes)):
        with pytest.raises(ReportError, match=str(wrong.folder)):
            gamma_readings(wrong, "train", 100)


def test_figure8_of_any_model_and_any_pairs(outputs, tmp_path):
    """A folder without a recipe: RMiPO's own bounds, and the pairs that are named."""
    write_model(tmp_path / "own", 5)
    given = {"N": "8", "MODEL": str(tmp_path / "own"), "DATA": str(outputs / "pairs")}
    ended = run_here("figure", "--split", "test", folder=tmp_path, env=given)
    assert ended.code == 0 and "at gamma_max" in ended.out
    table = pd.read_csv(tmp_path / "outputs/reports/figure8-own-pairs.csv", index_col="reading")
    naive = naive_scores(tmp_path / "own", pairs_of(outputs))
    pmi = [(naive[f"{s}_logps"] - naive[f"prior_{s}_logps"]) / naive[f"{s}_lengths"] for s in ("chosen", "rejected")]
    assert table["delta_pmi mean"].iloc[0] == pytest.approx((pmi[0] - pmi[1]).mean().item(), abs=1e-4)
    assert run_here("figure", folder=tmp_path, env=given | {"DATA": ""}).code == 2  # no recipe that names its pairs
    # Of a run of a setting with other pairs, none of the run's own has a part in it.
    path = shutil.copytree(outputs / "tiny/rmipo", tmp_path / "outputs/tiny/rmipo") / "run.json"
    record = json.loads(path.read_text())
    record["recipe"] |= {"dataset_name": None, "datasets": [{"path": "of the run, and gone"}], "test_split_size": 2}
    path.write_text(json.dumps(record))
    assert run_here("figure", folder=tmp_path, env=given | {"MODEL": "tiny"}).code == 0


def test_figures_that_cannot_be_drawn_are_refused(tmp_path):
    for given, named in (
        ({"N": "9", "MODEL": "tiny"}, "N="),
        ({"N": "7"}, "MODEL"),
        ({"N": "7", "MODEL": "tiny", "METHOD": "dpo"}, "METHOD"),  # else a figure of all methods would have its name
        ({"N": "6", "MODEL": "tiny"}, "make train MODEL=tiny METHOD=simpo"),
    ):
        ended = run_here("figure", folder=tmp_path, env=given)
        assert ended.code == 2 and named in ended.err
