"""The leaderboard's normalisation on hand values, and the whole path through lm-eval on the tiny setting's tasks."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import leaderboard
from rmipo.evaluation.leaderboard import BENCHMARK, TASKS, bbh_choices, evaluate, metrics_of
from rmipo.plan.preflight import PreflightError
from rmipo.recipe.files import merge_settings
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, pair, user, write
from tests.helpers.tiny_model import write_model

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
BBH_CHOICES = bbh_choices()


def with_error(metric: str, value: float, error: float = 0.01, size: int = 100) -> dict:
    return {f"{metric},none": value, f"{metric}_stderr,none": error, "sample_len": size}


def raw_results() -> dict[str, dict]:
    """Scores of one model, chosen so that each column has a simple value."""
    results = {f"leaderboard_bbh_{task}": with_error("acc_norm", 1 / n) for task, n in BBH_CHOICES.items()}
    results["leaderboard_bbh_snarks"] = with_error("acc_norm", 0.75)  # two choices: 50
    results["leaderboard_bbh_object_counting"] = with_error("acc_norm", 1.0)  # 100
    results["leaderboard_bbh"] = with_error("acc_norm", 0.99)  # lm-eval's size-weighted value, not to be used
    results |= {
        "leaderboard_musr_murder_mysteries": with_error("acc_norm", 0.6),  # 20
        "leaderboard_musr_object_placements": with_error("acc_norm", 0.4),  # 25
        "leaderboard_musr_team_allocation": with_error("acc_norm", 0.2),  # below a third: 0
        "leaderboard_gpqa": with_error("acc_norm", 0.99),  # as of BBH
        "leaderboard_gpqa_main": with_error("acc_norm", 0.30, 0.03, 300),
        "leaderboard_gpqa_diamond": with_error("acc_norm", 0.22, 0.04, 100),  # with main's 0.28: 4
        "leaderboard_mmlu_pro": with_error("acc", 0.28, 0.009),  # 20
        "leaderboard_math_algebra_hard": with_error("exact_match_original", 0.2, 0.03, 300) | {"exact_match,none": 0.5},
        "leaderboard_math_geometry_hard": with_error("exact_match_original", 0.04, 0.04) | {"exact_match,none": 0.1},
        "leaderboard_ifeval": with_error("prompt_level_strict_acc", 0.4) | with_error("inst_level_strict_acc", 0.5),
        "gsm8k": {"exact_match,flexible-extract": 0.7, "exact_match,strict-match": 0.6},
        "mmlu": with_error("acc", 0.6, 0.004),
    }
    return results


def test_metrics_and_their_errors_by_hand():
    found = {name: value for task in TASKS for name, value in metrics_of(task, raw_results()).items()}
    values = {name: value for name, value in found.items() if not name.endswith("_standard_error")}
    # MATH by size: (300 x 20 + 100 x 4) / 400 by the original scorer, (300 x 50 + 100 x 10) / 400 by Math-Verify.
    assert values == pytest.approx(
        {"ifeval": 45.0, "bbh": 150 / 24, "math": 16.0, "math_verify": 40.0, "gpqa": 4.0, "musr": 15.0,
         "mmlu_pro": 20.0, "gsm8k": 70.0, "gsm8k_strict": 60.0, "mmlu": 60.0}
    )  # fmt: skip
    # An error is rescaled as its score is; of a mean of n it is the root of the sum of squares, over n.
    assert found["mmlu_pro_standard_error"] == pytest.approx(0.9 / 0.9) and found["mmlu_standard_error"] == 0.4
    squares = sum((1 / (1 - 1 / n)) ** 2 for n in BBH_CHOICES.values())
    assert found["bbh_standard_error"] == pytest.approx(squares**0.5 / 24)
    assert found["math_standard_error"] == pytest.approx(((3 * 3) ** 2 + (1 * 4) ** 2) ** 0.5 / 4)
    assert found["gpqa_standard_error"] == pytest.approx(((3 * 3) ** 2 + (1 * 4) ** 2) ** 0.5 / 4 / 0.75)
    samples = [{"prompt_level_strict_acc": all(each), "inst_level_strict_acc": each} for each in ([1, 1], [1, 0], [0])]
    error = metrics_of("ifeval", raw_results(), samples)["ifeval_standard_error"]
    assert error == pytest.approx(np.std([100, 25, 0], ddof=1) / 3**0.5)


def test_a_trials_tasks_are_not_taken_for_the_benchmarks(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    asked = []
    monkeypatch.setattr(leaderboard, "load", lambda *arguments: "model")
    monkeypatch.setattr(
        leaderboard, "evaluate", lambda model, task, settings, path: asked.append(write(path, [{"metrics": {}}]))
    )
    settings = {"include_path": str(tmp_path), "engine": "transformers", "tasks": ["gsm8k"]}
    for limit, count in ((2, 1), (2, 1), (None, 2), (None, 2)):
        BENCHMARK.run(tmp_path / "model", tmp_path, settings | {"limit": limit})
        assert len(asked) == count


def test_data_and_choices_are_those_of_lm_eval():
    tasks = Path(importlib.util.find_spec("lm_eval.tasks").origin).parent
    folders = {name: tasks / "leaderboard" / name for name in TASKS} | {"gsm8k": tasks / "gsm8k"}
    folders |= {name: tasks / path for name, path in {"bbh": "leaderboard/bbh_mc", "mmlu": "mmlu/default"}.items()}
    named = re.compile(r"^dataset_path: (\S+)", re.MULTILINE)
    for name, folder in folders.items():
        texts = [file.read_text() for file in folder.glob("*yaml")]
        assert {path for text in texts for path in named.findall(text)} == {TASKS[name].data}, name
    assert len(BBH_CHOICES) == 24 and BBH_CHOICES["snarks"] == 2 and BBH_CHOICES["object_counting"] == 19


def test_what_is_missing_or_wrong_is_found_before_anything_loads(tmp_path, monkeypatch):
    for wrong in ({"batch_size": "auto:0"}, {"batch_size": "automatic"}, {"limit": 1.5}, {"limit": 0.0}):
        with pytest.raises(EvaluationError, match=next(iter(wrong))):
            merge_settings("leaderboard", leaderboard.DEFAULTS, wrong)
    settings = merge_settings("leaderboard", leaderboard.DEFAULTS, {"batch_size": "auto:4", "limit": 0.25})
    assert (settings["batch_size"], settings["limit"]) == ("auto:4", 0.25)
    with pytest.raises(EvaluationError, match=r"unknown \['ifevl'\]"):
        BENCHMARK.run("no/such/model", tmp_path, {"tasks": ["ifevl"]})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PreflightError, match="Idavidrein/gpqa"):
        BENCHMARK.run("no/such/model", tmp_path, {"tasks": ["gpqa"]})


def test_lm_eval_on_the_tiny_settings_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the tasks read outputs/tiny/world/
    write_model(tmp_path / "model")
    answers = [(f"w{i} w{i + 1}", f"w{i + 2} w{(3 * i) % 20}") for i in range(12)]
    rows = [pair(i, [user(f"w{i}")], [assistant(a)], [assistant(b)]) for i, (a, b) in enumerate(answers)]
    write(tmp_path / "outputs/tiny/world/pairs/test.jsonl", rows)
    settings = {"include_path": str(ROOT / "recipes" / "tiny" / "leaderboard"), "limit": 8}
    result = BENCHMARK.run(tmp_path / "model", tmp_path / "eval", settings | {"dtype": "float32"})

    assert result["settings"]["batch_size"] == 8  # on a CPU, for "auto"
    files = {task: next((tmp_path / "eval/leaderboard").glob(f"{task}-????????.json")) for task in list(TASKS)[:6]}
    raw = {name: scores for file in files.values() for name, scores in json.loads(file.read_text())["results"].items()}
    assert all(raw[f"leaderboard_bbh_{name}"]["sample_len"] == 8 for name in BBH_CHOICES)
    samples = [json.loads(line) for line in files["mmlu_pro"].with_suffix(".samples.jsonl").read_text().splitlines()]
    right = sum(sample["acc"] for sample in samples) / 8
    assert 0 < right < 1 and result["metrics"]["mmlu_pro"] == pytest.approx(100 * max(0, right - 0.1) / 0.9)
    error = 100 * (right * (1 - right) / 7) ** 0.5 / 0.9
    assert result["metrics"]["mmlu_pro_standard_error"] == pytest.approx(error)
    right = raw["leaderboard_bbh_navigate"]["acc_norm,none"]  # the same questions in every task
    bbh = [100 * max(0, right - 1 / n) / (1 - 1 / n) for n in BBH_CHOICES.values()]
    assert result["metrics"]["bbh"] == pytest.approx(sum(bbh) / 24)

    # Interrupted after two tasks: these aren't done again, the others are.
    for task in list(files)[2:]:
        files[task].unlink()
    done = {task: files[task].stat().st_mtime_ns for task in list(files)[:2]}
    asked = []
    monkeypatch.setattr(
        leaderboard, "evaluate", lambda m, task, *rest: (asked.append(task), evaluate(m, task, *rest))[1]
    )
    assert (
        BENCHMARK.run(tmp_path / "model", tmp_path / "eval", settings | {"dtype": "float32"})["metrics"]
        == result["metrics"]
    )
    assert asked == list(files)[2:] and done == {task: files[task].stat().st_mtime_ns for task in done}
    write_model(tmp_path / "model", seed=1)  # other weights
    BENCHMARK.run(tmp_path / "model", tmp_path / "eval", settings | {"dtype": "float32", "tasks": ["mmlu_pro"]})
    assert asked[4:] == ["mmlu_pro"]
