"""What every run has around it: how it starts, in which order things happen, how it ends."""

import json
from unittest import mock

import pytest
from transformers import AutoTokenizer, DefaultFlowCallback
from transformers.integrations import TensorBoardCallback

from rmipo.plan.preflight import PreflightError
from rmipo.recipe.load import load_recipe
from rmipo.record import read_generations, recorded_run
from rmipo.run import frame
from rmipo.run.callbacks import FiniteWatchdog, Recorder, StopOnSignal, WandbBySteps, set_callbacks
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.small_models import make_pairs
from tests.helpers.trainers import make_trainer
from tests.helpers.twins import changed, make_twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    return make_twin(folder, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")


def preference(overrides, output_dir):
    command = ["scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml", *overrides]
    return launch([*command, "--output_dir", str(output_dir)])


def test_a_finished_run_says_what_it_did_and_is_not_trained_again(tmp_path, twin):
    out = tmp_path / "out"
    twin = changed(twin, max_length=30, max_prompt_length=14, max_truncated_fraction=1.0, generation_samples=2)
    first = preference(twin, out)
    assert first.wait() == 0, first.output[-3000:]
    for said in ("train: 40 of 40 rows used", "test: 3 of 3 rows used", f"{out}/curves.png", f"{out}/gamma.png"):
        assert f"{said}\n" in first.output, said
    record = recorded_run(out)
    assert record["fingerprints"].keys() == {"train", "test", "model"} and record["objective"]["name"] == "rmipo"
    for lengths in (record["data"][split]["lengths"] for split in ("train", "test")):
        assert (lengths["prompt"]["max"], lengths["chosen"]["max"], lengths["rejected"]["max"]) == (14, 16, 16)
    assert len(record["prompt_probe"]) == 2 and record["results"]["parity"] < 1e-5
    assert round(record["results"]["eval_samples_per_second"] * record["results"]["eval_runtime"]) == 3
    samples = read_generations(out)
    assert [line["step"] for line in samples] == [2, 2] and max(len(line["answer"]) for line in samples) < 50
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = preference(twin, out)
    assert again.wait() == 0 and f"{out} holds this run, already finished" in again.output, again.output[-3000:]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files
    (out / "model.safetensors").unlink()  # without its model it has to be made again
    third = preference(twin, out)
    assert third.wait() == 0 and (out / "model.safetensors").exists() and recorded_run(out)["starts"] == 2


def test_a_run_in_which_nothing_is_logged_ends_well(tmp_path, twin):
    out = tmp_path / "out"
    run = preference([*changed(twin, logging_steps=500), "--objective.fidelity", "release"], out)
    assert run.wait() == 0, run.output[-5000:]
    assert recorded_run(out)["finished"] and (out / "model.safetensors").exists()
    with open(f"{twin[3]}/train.jsonl") as file:
        answers = [json.loads(line)["chosen"][-1]["content"] for line in file]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"  # which the released code scores with the response
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer([f"{header}{answer}<|eot_id|>" for answer in answers], add_special_tokens=False)["input_ids"]
    assert recorded_run(out)["data"]["train"]["tokens"]["chosen"] == sum(map(len, ids))


def test_callbacks_are_called_in_one_order(tmp_path):
    trainer = make_trainer(tmp_path, make_pairs(8), report_to=["wandb", "tensorboard"])
    trainer.pop_callback(Recorder)
    set_callbacks(trainer, [FiniteWatchdog(), Recorder(), StopOnSignal()])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    order = {kind: kinds.index(kind) for kind in kinds}
    # A stop asks for a save, which asks for a line, which W&B is sent after a kill, and which shows why a run ended.
    assert 0 == order[DefaultFlowCallback] < order[StopOnSignal] < order[Recorder]
    assert order[Recorder] < min(order[WandbBySteps], order[TensorBoardCallback], order[FiniteWatchdog])


@pytest.mark.parametrize("end, code", [("well", 0), ("stop", 75), ("error", 2)])
def test_a_process_of_several_ends_while_threads_of_its_groups_live(end, code):
    run = launch(["tests/helpers/threads_at_exit.py", end], processes=2)
    assert run.wait() == code, run.output[-3000:]
    for rank in range(2):
        assert f"rank {rank} ran its exit functions" in run.output
    assert ("error: as asked for" in run.output) is (end == "error")
    assert "the interpreter is taken down" not in run.output


def test_a_metric_of_the_objective_is_a_measure_of_the_best_model():
    """tests/test_bad_input.py has one that isn't."""
    overrides = ["--model_name_or_path=a/b", "--metric_for_best_model=eval_rmipo/gamma_mean"]
    frame.check_best_metric(load_recipe(ROOT / "recipes/tiny/rmipo.yaml", overrides=overrides).parse(world_size=1)[0])


@pytest.mark.parametrize(("stage", "script"), [("sft", "sft"), ("rmipo", "preference")])
def test_training_scripts_check_the_machine_before_they_load_anything(stage, script, monkeypatch, tmp_path):
    monkeypatch.setattr(frame, "check_run", mock.Mock(side_effect=PreflightError("too small")))
    overrides = ["--model_name_or_path=a/b", "--dataset_name=c/d", f"--output_dir={tmp_path / 'run'}"]
    ended = run_here(script, "--config", f"recipes/tiny/{stage}.yaml", *overrides)
    assert ended.code == 2 and ended.err.endswith("error: too small\n") and not (tmp_path / "run").exists()
