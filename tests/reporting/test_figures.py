"""Figures: the numbers behind the ink, and what is said where inputs are missing.

Per-pair arrays of Figures 3, 6 and 8 from a saved model, against unpacked scoring and the formulas by hand.
"""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from rmipo.objectives import build_objective
from rmipo.plots import draw_curves
from rmipo.reporting.figures_pairs import (
    differences,
    figure6,
    figure8,
    gamma_readings,
    judge_differences,
    reward_differences,
    run_scores,
    summarize,
    wasserstein,
)
from rmipo.reporting.figures_runs import figure2, figure5, figure7
from rmipo.reporting.results import ReportError, load_run
from tests.helpers.programs import run_here
from tests.helpers.result_files import write_result, write_run
from tests.helpers.rows import write
from tests.helpers.tiny_model import naive_scores, write_model

RANDOM = np.random.default_rng(0)
OBJECTIVE = build_objective({"name": "rmipo", "gamma_min": 0.3, "gamma_max": 1.6})


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_curves_signals_and_intervals_by_hand():
    scores = {"chosen_logps": -1.2, "rejected_logps": -1.6, "prior_chosen_logps": -3.0, "prior_rejected_logps": -2.4}
    scores |= {"chosen_lengths": 3.0, "rejected_lengths": 2.0}
    found = differences({name: torch.tensor([value]) for name, value in scores.items()})
    assert found["loglik"].item() == pytest.approx(0.4)  # -0.4 + 0.8
    assert found["pmi"].item() == pytest.approx(0.2)  # 0.6 - 0.4
    judged = RANDOM.normal(size=300)
    assert wasserstein(np.zeros(10), np.array([0.0] * 5 + [1.0] * 5)) == pytest.approx(0.5, abs=1e-3)
    shown = figure6(judged, {"dpo": 2 * judged, "simpo": judged**3}, "").axes[0].get_legend().get_texts()
    assert shown[1].get_text() == "DPO: $W_1$ to REF 0.00 [0.00, 0.00]"  # drawn apart, the two would differ
    distance, low, high = map(float, re.findall(r"\d\.\d\d", shown[2].get_text()))
    assert 0 < low < distance < high
    axis = plt.figure().add_subplot()
    points = [("dpo", 0, 1.0), ("dpo", 0, 4.0), ("dpo", 10, 2.0), ("dpo", 10, 2.0), ("rmipo", 0, 7.0)]
    draw_curves(axis, pd.DataFrame(points, columns=["method", "step", "value"]), "value", str.upper)
    assert [line.get_ydata().tolist() for line in axis.lines] == [[2.5, 2.0], [7.0]]
    assert [line.get_label() for line in axis.lines] == ["DPO", "RMIPO"] and axis.lines[1].is_dashed()
    band = axis.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0, 1.0), (0, 4.0), (10, 2.0)}


def test_figure2_reads_hyperparameters_from_every_run_below_the_model(tmp_path):
    def add(name, objective, score, rate=3e-7):
        log = [{"step": 1, "eval_acc": 0.0}, {"step": 2, "eval_acc": score}]
        write_run(tmp_path / "tiny" / name, objective, log, rate)

    for beta, score in ((0.01, 0.7), (0.1, 0.6)):
        add(f"sweep/dpo-{beta}", {"name": "dpo", "beta": beta}, score)
        add(f"sweep/dpo-{beta}-fast", {"name": "dpo", "beta": beta}, score + 0.1, rate=1e-6)
    for beta, gamma, score in ((2.0, 1.0, 0.5), (8.0, 1.0, 0.55), (2.0, 1.6, 0.65), (8.0, 1.6, 0.99)):
        add(f"sweep/simpo-{beta}-{gamma}", {"name": "simpo", "beta": beta, "gamma": gamma}, score)
    lines = [[line.get_ydata().tolist() for line in axis.lines] for axis in figure2(tmp_path, "tiny", "eval_acc").axes]
    assert lines[0] == [[0.7, 0.6], [pytest.approx(0.8), pytest.approx(0.7)]]  # one line for each learning rate
    assert lines[1:] == [[[0.5, 0.55]], [[0.5, 0.65]]]  # beta 8 with gamma 1.6 is on neither line


SIMPO_RUNS = ((2.0, 1.0), (4.0, 1.0), (2.0, 0.3))
FIGURE2_RUNS = [{"name": "dpo", "beta": beta} for beta in (0.01, 0.1)]
FIGURE2_RUNS += [{"name": "simpo", "beta": beta, "gamma": gamma} for beta, gamma in SIMPO_RUNS]


def write_figure2(outputs, metrics=lambda i: {"mt_bench": 5.0 + i}, bench="mtbench", **changes):
    for i, objective in enumerate(FIGURE2_RUNS):
        write_run(outputs / "tiny" / f"sweep-{objective['name']}/run{i}", objective, [])
        write_result(outputs, "tiny", f"sweep-{objective['name']}/run{i}", bench, metrics(i), **changes)


def test_figure2_by_an_evaluation_shows_the_start_unless_another_judge_rated_it(tmp_path):
    ours, other = ({"judge_endpoint": endpoint} for endpoint in ("127.0.0.1:8123/v1", "api.openai.com/v1"))
    write_figure2(tmp_path, settings=ours)
    write_result(tmp_path, "tiny", "initial", "mtbench", {"mt_bench": 4.5}, settings=ours)
    axes = figure2(tmp_path, "tiny").axes
    assert axes[0].lines[0].get_ydata().tolist() == [5.0, 6.0]
    assert all(set(axis.lines[1].get_ydata()) == {4.5} for axis in axes)
    write_result(tmp_path, "tiny", "initial", "mtbench", {"mt_bench": 4.5}, settings=other)
    with pytest.raises(ReportError, match=r"judge_endpoint 127\.0\.0\.1:8123/v1 in .*api\.openai\.com/v1"):
        figure2(tmp_path, "tiny")


def test_figure2_shows_repetitions_as_mean_and_range_and_single_runs_with_their_error(tmp_path):
    rates = [{"alpacaeval2_wr": 5.0 + i, "alpacaeval2_wr_standard_error": 0.25} for i in range(len(FIGURE2_RUNS))]
    changes = {"judge_endpoint": "127.0.0.1:8000/v1", "first_n": 4}
    write_figure2(tmp_path, metrics=rates.__getitem__, bench="alpacaeval", settings=changes)
    write_run(tmp_path / "tiny" / "again", FIGURE2_RUNS[0], [], seed=7)
    write_result(tmp_path, "tiny", "again", "alpacaeval", {"alpacaeval2_wr": 4.0}, settings=changes)
    figure = figure2(tmp_path, "tiny", "alpacaeval2_wr")
    axis, notes = figure.axes[0], figure.get_supxlabel().replace("\n", " ")
    assert axis.lines[0].get_ydata().tolist() == [4.5, 6.0] and len(axis.lines) == 1
    bars = [segment[:, 1].tolist() for bar in axis.collections for segment in bar.get_segments()]
    assert bars == [[4.0, 5.0], [5.75, 6.25]]
    assert "judge_endpoint is 127.0.0.1:8000/v1, the paper's is api.openai.com/v1." in notes
    assert "TRIAL, not the benchmark itself: AlpacaEval 2 with first_n=4." in notes


def test_figure2_leaves_out_unfinished_runs_and_results_without_the_metric(tmp_path):
    write_figure2(tmp_path, metrics=lambda i: {"mt_bench": 5.0 + i} if i != 1 else {"other": 1.0})
    write_run(tmp_path / "tiny" / "open", {"name": "dpo", "beta": 0.05}, [], finished=False)
    write_result(tmp_path, "tiny", "open", "mtbench", {"mt_bench": 9.0})
    with pytest.raises(ReportError, match=r"METHOD=dpo.*METHOD=sweep-dpo/<point> BENCH=mtbench"):
        figure2(tmp_path, "tiny")


def hh(helpful, harmless):
    return {"hh_helpful": helpful, "hh_harmless": harmless, "hh_average": (helpful + harmless) / 2}


def test_figure5_of_models_that_were_not_trained_on_hh(tmp_path):
    settings, errors = {"other_pairs": ["mine"]}, {"hh_helpful_standard_error": 1.0, "hh_harmless_standard_error": 2.0}
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "hh", hh(64.0, 66.0) | errors, settings=settings)
    write_result(tmp_path, "llama3-8b-instruct", "dpo", "hh", hh(61.0, 63.0), settings=settings)
    axis = figure5(tmp_path, "llama3-8b-instruct").axes[0]
    bars = axis.collections[1].get_segments()
    average = 1.96 * 5**0.5 / 2
    expected = [(64 - 1.96, 64 + 1.96), (66 - 3.92, 66 + 3.92), (65 - average, 65 + average)]
    assert np.allclose([(segment[0][1], segment[1][1]) for segment in bars], expected)
    assert [patch.get_height() for patch in axis.patches] == [61.0, 63.0, 62.0, 64.0, 66.0, 65.0]
    assert "the paper's average" not in axis.get_legend_handles_labels()[1]  # it is of models trained on HH
    assert axis.get_title(loc="left") == "Llama3-8B-Instruct, not trained on HH; not Anthropic's pairs: mine"


def test_figure5_takes_each_subset_from_the_model_trained_on_it_for_all_methods_or_none(tmp_path):
    for subset, own, other in (("helpful", 70.0, 10.0), ("harmless", 60.0, 20.0)):
        rates = {"hh_helpful": other, "hh_harmless": other} | {f"hh_{subset}": own}
        write_result(tmp_path, f"llama3-8b-instruct-hh-{subset}", "rmipo", "hh", rates)
        write_result(tmp_path, "llama3-8b-instruct", "dpo", "hh", hh(99.0, 98.0))  # no model trained on HH
    axis = figure5(tmp_path, "llama3-8b-instruct").axes[0]
    assert [patch.get_height() for patch in axis.patches] == [70.0, 60.0, 65.0]
    segments = [segment for drawn in axis.collections for segment in drawn.get_segments()]
    assert [a[1] for a, b in segments if a[1] == b[1] and a[0] != b[0]] == [64.8]  # the paper's line
    assert axis.get_title(loc="left") == "Llama3-8B-Instruct, trained on the HH subset (average: one model each)"


def test_figure7_curves_and_costs(tmp_path):
    for scale, method in ((1, "dpo"), (2, "rmipo")):
        log = [{"step": s, "common/margin_avg_logp": scale * s, "common/acc_avg_logp": 0.5} for s in range(1, 11)]
        log = [row | {"peak_memory_gib": scale + row["step"]} for row in log]
        write_run(tmp_path / "tiny" / method, {"name": method}, log, starts=scale, seconds=3600 * scale)
    cost, margin, accuracy = figure7(tmp_path, "tiny").axes[:3]
    assert [patch.get_width() for patch in cost.patches] == [1.0, 2.0]
    assert [text.get_text() for text in cost.texts] == ["11.0 GiB", "12.0 GiB"]
    assert [label.get_text() for label in cost.get_yticklabels()] == ["DPO", "RMiPO*"]  # of its last start alone
    assert margin.lines[1].get_ydata().tolist() == [2.0 * s for s in range(1, 11)]
    assert set(accuracy.lines[0].get_ydata()) == {0.5}


def test_figure8_shows_the_atoms_apart_from_the_density():
    inner = RANDOM.uniform(0.8, 1.5, 600)
    gamma = np.concatenate([inner, np.full(300, 1.6), np.full(100, 0.3)])
    other = RANDOM.normal(size=1000)
    axes = figure8({"token": pd.DataFrame({"delta_pmi": other, "gamma": gamma})}, OBJECTIVE, "").axes
    named = {axis.get_ylabel(): axis for axis in axes}
    grid, curve = named["Density"].lines[0].get_data()
    assert np.trapezoid(curve, grid) == pytest.approx(1.0, abs=0.01)
    assert curve[grid > 1.59].max() < 0.3 and curve[grid < 0.4].max() < 0.01
    assert {text.get_text() for text in named["At a bound"].texts} == {"30%", "10%"}


def test_results_of_mixed_versions_make_no_figure(tmp_path):
    for method, version in (("dpo", "5.22.0"), ("rmipo", "5.23.0")):
        write_result(tmp_path, "tiny", method, "hh", hh(60.0, 62.0), versions={"transformers": version})
    with pytest.raises(ReportError, match=r"transformers 5\.22\.0 in .*dpo"):
        figure5(tmp_path, "tiny")


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
        ({"N": "99", "MODEL": "tiny"}, "N="),
        ({"N": "7"}, "MODEL"),
        ({"N": "7", "MODEL": "tiny", "METHOD": "dpo"}, "METHOD"),  # else a figure of all methods would have its name
        ({"N": "6", "MODEL": "tiny"}, "make train MODEL=tiny METHOD=simpo"),
    ):
        ended = run_here("figure", folder=tmp_path, env=given)
        assert ended.code == 2 and named in ended.err
