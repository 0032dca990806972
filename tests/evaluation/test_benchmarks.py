"""The registry of benchmarks: light to import, complete, and true to what each benchmark returns and takes."""

import json
import re

import pytest
import wandb
from huggingface_hub import ModelCard

from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS, alpaca, benchmark_of, metric_label, mtbench
from rmipo.evaluation.alpaca import load_reference
from rmipo.evaluation.benchmark import publish
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, user, write
from tests.helpers.tiny_model import write_model
from tests.helpers.wandb_file import read_records


def test_a_metric_belongs_to_one_benchmark_and_settings_that_are_compared_exist():
    names = [name for benchmark in BENCHMARKS.values() for name in benchmark.metrics]
    assert len(names) == len(set(names))
    assert benchmark_of("bbh").name == "leaderboard" and metric_label("bbh") == "BBH"
    assert benchmark_of("loss") is None and metric_label("loss") == "loss"
    recorded = {"judge_endpoint", "other_pairs", "model_fingerprint", "initial_fingerprint"}
    recorded |= {f"{name}_sha256" for name in ("judge", "reference", "pairs", "prompts", "answers")}
    for benchmark in BENCHMARKS.values():
        named = {*benchmark.same, *benchmark.same_per_model, *benchmark.trial, *benchmark.paper}
        assert {name.partition(".")[0] for name in named} <= benchmark.defaults.keys() | recorded, benchmark.name
        assert set(benchmark.optional) <= set(benchmark.same)


def test_the_benchmark_in_the_docs_runs(tmp_path):
    page = (ROOT / "docs/EVALUATION.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    write_model(tmp_path)
    generation = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 4}
    result = names["BENCHMARK"].run(tmp_path, tmp_path / "eval", {"first_n": 3, "generation": generation})
    assert result["metrics"]["sums"] == 0.0  # the model has no digits
    assert result["metrics"].keys() == {"sums", "sums_standard_error", "sums_cut"} and result["versions"]


CONSTRAINTS = BENCHMARKS["constraints"]
RESULT = {
    "metrics": {"constraints_all": 28.123456, "constraints_cut": 70.0, "constraints_all_standard_error": 2.0},
    "per_prompt": {"constraints_all": [100.0, None], "constraints_each": [100.0, 50.0]},
    "settings": CONSTRAINTS.defaults | {"first_n": 2},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags:\n- rmipo\n---\n\n# tiny: rmipo\n\nThe text.\n")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"report_to": "none"}, "wandb_run_id": "abc123"}))
    return tmp_path


def results(folder) -> dict:
    card = ModelCard.load(folder / "README.md")
    assert "The text." in card.text and card.data.tags == ["rmipo"] and card.data.model_name == folder.name
    return {(one.dataset_config, one.metric_name): one.metric_value for one in card.data.eval_results}


def test_a_card_has_the_numbers_of_every_evaluation_once_of_runs_of_ours(folder):
    publish(folder, CONSTRAINTS, RESULT)
    first = {(None, "All constraints (%)"): 28.1235, (None, "Cut (%)"): 70.0}
    assert results(folder) == first
    assert ModelCard.load(folder / "README.md").data.eval_results[0].dataset_args == {"first_n": 2}  # a part of it
    publish(folder, CONSTRAINTS, RESULT, name="other-judge")
    publish(folder, CONSTRAINTS, RESULT | {"metrics": {"constraints_all": 30.0}})  # evaluated again
    named = {("other-judge", label): value for (_, label), value in first.items()}
    assert results(folder) == {(None, "All constraints (%)"): 30.0} | named
    (folder / "run.json").unlink()
    before = (folder / "README.md").read_text()
    publish(folder, CONSTRAINTS, RESULT)
    assert (folder / "README.md").read_text() == before


def test_the_wandb_run_is_continued_with_summary_and_table(folder, monkeypatch):
    wandb.teardown()  # what an earlier test of this process read from its environment
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    (folder / "run.json").write_text(json.dumps({"recipe": {"report_to": ["wandb"]}, "wandb_run_id": "abc123"}))
    publish(folder, CONSTRAINTS, RESULT)
    wandb.teardown()  # its process has ended then: before, the file may be incomplete
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert file.name == "run-abc123.wandb"
    updates = [item for record in read_records(file) for item in record.summary.update]
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    assert summary["eval/constraints/constraints_all"] == 28.123456
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/eval/constraints_*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "constraints_all", "constraints_each"]
    assert content["data"] == [[0, 100.0, 100.0], [1, None, 50.0]]


def test_preference_pairs_as_reference(tmp_path):
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("c", "4")]
    for name in ("pairs.jsonl", "pairs.jsonl.gz"):
        file = write(tmp_path / name, [{"prompt": [user(q)], "chosen": [assistant(c)]} for q, c in pairs])
        rows, _ = load_reference(str(file))
        assert [(row["instruction"], row["output"]) for row in rows] == [("b", "1"), ("a", "2"), ("c", "4")]


@pytest.mark.parametrize(
    ("key", "settings", "error", "named"),
    [
        ("", {}, EvaluationError, "OPENAI_API_KEY"),
        ("none", {"judge": "gpt-4"}, EvaluationError, "judge"),
        ("none", {"reference": "absent.json"}, OSError, "absent.json"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, key, settings, error, named):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(error, match=re.escape(named)):
        alpaca.BENCHMARK.run(tmp_path / "no model", tmp_path, {"length_controlled": False, **settings})


def test_mtbench_metrics_by_hand(tmp_path):
    categories = enumerate(("math", "stem", "coding"), 81)
    questions = [{"question_id": number, "category": name} for number, name in categories]
    path = tmp_path / "judge_single.jsonl"
    # No rating; out of MT-Bench's range; a line that a kill cut.
    scores = [(81, 1, -1), (81, 1, 8), (81, 2, 11), (83, 1, 0), (81, 2, 5), (82, 1, 3.0)]
    lines = [json.dumps(dict(zip(("question_id", "turn", "score"), row, strict=True))) for row in scores]
    path.write_text("\n".join([*lines, lines[0][:20]]))
    for _ in range(2):
        metrics, per_question = mtbench.metrics_of(mtbench.read_verdicts(path, questions))
        assert metrics == {
            "mt_bench": pytest.approx(16 / 3), "mt_bench_turn1": 5.5, "mt_bench_turn2": 5.0, "mt_bench_math": 6.5,
            "mt_bench_stem": 3.0, "mt_bench_missing": 3,
            "mt_bench_standard_error": pytest.approx((3.5**2 / 2) ** 0.5 / 2**0.5),  # of the questions' 6.5 and 3.0
        }  # fmt: skip
        assert per_question == [6.5, None, None]
