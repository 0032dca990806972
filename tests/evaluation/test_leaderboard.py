"""The leaderboard's normalisation on hand values, and the whole path through lm-eval on the tiny setting's tasks."""

import json

import pytest
import yaml

from rmipo.evaluation.leaderboard import BBH_CHOICES, leaderboard_metrics, normalize, run
from tests.helpers.paths import ROOT
from tests.helpers.tiny_model import write_model


def test_normalize_by_hand():
    assert normalize(0.25, 4) == 0.0
    assert normalize(1.0, 4) == 100.0
    assert normalize(0.10, 4) == 0.0  # worse than guessing is 0, not negative
    assert normalize(0.625, 4) == pytest.approx(50.0)  # (0.625 - 0.25) / 0.75
    assert normalize(0.6, 2) == pytest.approx(20.0)
    assert normalize(0.19, 10) == pytest.approx(10.0)


def raw_results() -> dict[str, dict]:
    """Scores of one model, chosen so that each column has a simple value."""
    results = {f"leaderboard_bbh_{task}": {"acc_norm,none": 1 / n} for task, n in BBH_CHOICES.items()}
    results["leaderboard_bbh_snarks"] = {"acc_norm,none": 0.75}  # two choices: 50
    results["leaderboard_bbh_object_counting"] = {"acc_norm,none": 1.0}  # 100
    results["leaderboard_bbh"] = {"acc_norm,none": 0.99}  # lm-eval's size-weighted value, not to be used
    results |= {
        "leaderboard_musr_murder_mysteries": {"acc_norm,none": 0.6},  # 20
        "leaderboard_musr_object_placements": {"acc_norm,none": 0.4},  # 25
        "leaderboard_musr_team_allocation": {"acc_norm,none": 0.2},  # below a third: 0
        "leaderboard_gpqa": {"acc_norm,none": 0.28},  # 4
        "leaderboard_mmlu_pro": {"acc,none": 0.28},  # 20
        "leaderboard_math_hard": {"exact_match,none": 0.035},
        "leaderboard_ifeval": {"prompt_level_strict_acc,none": 0.4, "inst_level_strict_acc,none": 0.5},
    }
    return results


def test_metrics_by_hand():
    metrics = leaderboard_metrics(raw_results())
    assert metrics == pytest.approx(
        {"ifeval": 45.0, "bbh": 150 / 24, "math": 3.5, "gpqa": 4.0, "musr": 15.0, "mmlu_pro": 20.0}
    )


def test_all_missing_scores_are_named_at_once():
    results = raw_results()
    del results["leaderboard_bbh_navigate"], results["leaderboard_ifeval"]["inst_level_strict_acc,none"]
    with pytest.raises(ValueError, match=r"2 scores.*leaderboard_ifeval \(inst_level.*leaderboard_bbh_navigate"):
        leaderboard_metrics(results)


def test_unknown_setting_is_refused_before_anything_loads(tmp_path):
    with pytest.raises(ValueError, match=r"leaderboard: unknown keys \['batchsize'\].*batch_size"):
        run("no/such/model", tmp_path, {"batchsize": 4})


def test_choices_match_lm_evals_tasks():
    tasks = pytest.importorskip("lm_eval.tasks").__path__[0]
    counted = {}
    for name in BBH_CHOICES:
        with open(f"{tasks}/leaderboard/bbh_mc/{name}.yaml") as file:
            counted[name] = len(yaml.safe_load(file)["doc_to_choice"])
    assert counted == BBH_CHOICES


def test_lm_eval_on_the_tiny_settings_tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)  # the tasks read outputs/tiny/world/
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    pairs = tmp_path / "outputs" / "tiny" / "world" / "pairs"
    pairs.mkdir(parents=True)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    with (pairs / "test.jsonl").open("w") as file:
        for i in range(12):
            texts = {"prompt": f"w{i}", "chosen": f"w{i} w{i + 1}", "rejected": f"w{i + 2} w{(3 * i) % 20}"}
            row = {side: [{"role": roles[side], "content": text}] for side, text in texts.items()}
            file.write(json.dumps(row) + "\n")
    settings = {"include_path": str(ROOT / "recipes" / "tiny" / "leaderboard"), "limit": 8, "batch_size": 8}
    result = run(tmp_path / "model", tmp_path / "eval", settings | {"dtype": "float32"})

    raw = json.loads((tmp_path / "eval" / "leaderboard_raw.json").read_text())["results"]
    assert {f"leaderboard_bbh_{name}" for name in BBH_CHOICES} < raw.keys()
    assert all(scores["sample_len"] == 8 for name, scores in raw.items() if name.startswith("leaderboard_bbh_"))
    right = raw["leaderboard_mmlu_pro"]["acc,none"]
    assert 0 < right < 1 and 8 * right == int(8 * right)
    assert result["metrics"]["mmlu_pro"] == pytest.approx(100 * max(0, right - 0.1) / 0.9)
    right = raw["leaderboard_bbh_navigate"]["acc_norm,none"]  # the same questions in every task
    assert result["metrics"]["bbh"] == pytest.approx(sum(normalize(right, n) for n in BBH_CHOICES.values()) / 24)
    assert result["metrics"]["ifeval"] == 100 * raw["leaderboard_ifeval"]["inst_level_strict_acc,none"]
    assert result["versions"]["lm_eval"] and result["settings"]["apply_chat_template"] is True
