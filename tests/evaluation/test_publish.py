"""What an evaluation leaves in the card of the model and in the W&B run that trained it."""

import json

import pytest
import wandb
from huggingface_hub import ModelCard

from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.publish import publish
from tests.helpers.wandb_file import read_records

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
    """(name of the evaluation, metric) -> value, as the hub reads the card."""
    card = ModelCard.load(folder / "README.md")
    assert "The text." in card.text and card.data.tags == ["rmipo"] and card.data.model_name == folder.name
    return {(one.dataset_config, one.metric_name): one.metric_value for one in card.data.eval_results}


def test_a_card_has_the_numbers_of_every_evaluation_once(folder):
    publish(folder, CONSTRAINTS, RESULT)
    first = {(None, "All constraints (%)"): 28.1235, (None, "Cut (%)"): 70.0}
    assert results(folder) == first
    assert ModelCard.load(folder / "README.md").data.eval_results[0].dataset_args == {"first_n": 2}  # a part of it
    publish(folder, CONSTRAINTS, RESULT, name="other-judge")
    publish(folder, CONSTRAINTS, RESULT | {"metrics": {"constraints_all": 30.0}})  # evaluated again
    named = {("other-judge", label): value for (_, label), value in first.items()}
    assert results(folder) == {(None, "All constraints (%)"): 30.0} | named


def test_models_that_no_run_of_ours_trained_are_left_alone(folder):
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


def test_a_named_evaluation_stands_beside_the_usual_one_in_wandb(folder, monkeypatch):
    (folder / "run.json").write_text(json.dumps({"recipe": {"report_to": ["wandb"]}, "wandb_run_id": "abc123"}))
    written = []
    monkeypatch.setattr("rmipo.evaluation.publish.write_to_wandb", lambda *given: written.append(given[:2]))
    publish(folder, CONSTRAINTS, RESULT)
    publish(folder, CONSTRAINTS, RESULT, name="other-judge")
    assert written == [("abc123", "eval/constraints"), ("abc123", "eval/constraints-other-judge")]
