"""The leaderboard's normalisation on hand values, and the whole path through lm-eval on local tasks."""

import json

import pytest
import yaml

from rmipo.evaluation.leaderboard import BBH_CHOICES, MUSR_CHOICES, leaderboard_metrics, normalize, run
from tests.evaluation.tiny_model import write_model


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


def write_tasks(folder) -> None:
    """Every task of the leaderboard under its own name, on a few local questions."""
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]

    def task(name: str, rows: list[dict], **config) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"test_split": "test"} | config))

    def choice_task(name: str, choices: int) -> None:
        # One question each, another one for every task, so that a random model gets some of them right.
        first = len(list(folder.iterdir()))
        rows = [{"question": f"w{first % 7}", "choices": [f"w{(first + c) % 20}" for c in range(choices)]}]
        fields = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
        task(name, rows, output_type="multiple_choice", metric_list=metrics, **fields)

    def group(name: str, members: list[str], metric: str) -> None:
        aggregate = [{"metric": metric, "aggregation": "mean", "weight_by_size": True}]
        content = {"group": name, "task": members, "aggregate_metric_list": aggregate}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    for name, n in BBH_CHOICES.items():
        choice_task(f"leaderboard_bbh_{name}", n)
    for name, n in MUSR_CHOICES.items():
        choice_task(f"leaderboard_musr_{name}", n)
    gpqa = [f"leaderboard_gpqa_{name}" for name in ("main", "diamond", "extended")]
    for name in gpqa:
        choice_task(name, 4)
    choice_task("leaderboard_mmlu_pro", 10)
    generation = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    generation["generation_kwargs"] = {"max_gen_toks": 2, "until": ["\n"]}
    questions = [{"question": "w1", "answer": "w2"}]
    task("leaderboard_math_algebra_hard", questions, metric_list=[{"metric": "exact_match"}], **generation)
    strict = [{"metric": f"{level}_level_strict_acc", "aggregation": "mean"} for level in ("prompt", "inst")]
    task("leaderboard_ifeval", questions, metric_list=strict, **generation)
    path = folder / "leaderboard_ifeval.yaml"
    path.write_text(path.read_text() + "process_results: !function scoring.process_results\n")
    (folder / "scoring.py").write_text(
        "def process_results(doc, results):\n"
        "    return {'prompt_level_strict_acc': 0.25, 'inst_level_strict_acc': 0.75}\n"
    )
    bbh, musr = ([f"leaderboard_{g}_{n}" for n in names] for g, names in (("bbh", BBH_CHOICES), ("musr", MUSR_CHOICES)))
    group("leaderboard_bbh", bbh, "acc_norm")
    group("leaderboard_musr", musr, "acc_norm")
    group("leaderboard_gpqa", gpqa, "acc_norm")
    group("leaderboard_math_hard", ["leaderboard_math_algebra_hard"], "exact_match")
    members = ["bbh", "musr", "gpqa", "mmlu_pro", "math_hard", "ifeval"]
    group("leaderboard", [f"leaderboard_{name}" for name in members], "acc_norm")


def test_lm_eval_on_local_tasks(tmp_path):
    pytest.importorskip("lm_eval")
    for name in ("model", "tasks"):
        (tmp_path / name).mkdir()
    write_model(tmp_path / "model")
    write_tasks(tmp_path / "tasks")
    settings = {"include_path": str(tmp_path / "tasks"), "batch_size": 8, "device": "cpu", "dtype": "float32"}
    result = run(tmp_path / "model", tmp_path / "eval", settings)

    raw = json.loads((tmp_path / "eval" / "leaderboard_raw.json").read_text())["results"]
    assert {f"leaderboard_bbh_{name}" for name in BBH_CHOICES} < raw.keys()
    assert result["metrics"] == leaderboard_metrics(raw)
    assert result["metrics"]["ifeval"] == 50.0
    by_hand = [normalize(raw[f"leaderboard_bbh_{name}"]["acc_norm,none"], n) for name, n in BBH_CHOICES.items()]
    assert any(by_hand) and result["metrics"]["bbh"] == pytest.approx(sum(by_hand) / 24)
    assert result["versions"]["lm_eval"] and result["settings"]["apply_chat_template"] is True
