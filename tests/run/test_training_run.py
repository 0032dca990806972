"""What surrounds a run: what is set up and taken down, in which order things happen, what is recorded, how it ends."""

import datetime
import errno
import json
import signal
import sys
import types
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer, DefaultFlowCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from rmipo.errors import CheckpointError
from rmipo.files import LOCK_FILE
from rmipo.fingerprints import model_fingerprint
from rmipo.plan.preflight import PreflightError
from rmipo.recipe.load import load_recipe
from rmipo.record import read_generations, read_metrics, recorded_run
from rmipo.run import export, frame
from rmipo.run.callbacks import (
    EXIT_STOPPED,
    FiniteWatchdog,
    Recorder,
    SilenceWatchdog,
    StopOnSignal,
    WandbBySteps,
    set_callbacks,
)
from rmipo.run.frame import FullDiskError, training_run
from rmipo.training import checkpoints
from rmipo.training.checkpoints import marked
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.small_models import make_pairs, make_trainer
from tests.helpers.twins import changed, make_twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return make_twin(tmp_path_factory.mktemp("twin"), "tiny/rmipo", "llama3", "on_policy_ultrafeedback")


@pytest.fixture
def enter(twin, tmp_path):
    """`enter(key=value, ...)`: the context of a run in `tmp_path/out`."""

    def training_run_of(keep=True, **values):
        flags = dict(zip(twin[::2], twin[1::2], strict=True)) | {"--output_dir": str(tmp_path / "out")}
        flags |= {f"--{key}": str(value) for key, value in values.items()}
        overrides = [text for pair in flags.items() for text in pair]
        recipe = load_recipe(ROOT / "recipes/tiny/rmipo.yaml", overrides=overrides)
        args, _, model_config = recipe.parse()
        return training_run(recipe, args, model_config, keep=keep)

    return training_run_of


class Watching(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.record = recorded_run(args.output_dir)


def make_run_trainer(run):
    """A trainer of one step with a checkpoint, whose model isn't the recipe's."""
    trainer = make_trainer(run.folder, make_pairs(8))
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.pop_callback(Recorder)  # the run brings its own
    return trainer


def kinds(trainer):
    return {type(callback) for callback in trainer.callback_handler.callbacks}


def test_what_a_run_sets_up_is_taken_down_after_it_or_never_where_nothing_is_kept(tmp_path, enter, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with enter(seed=7, trust_remote_code="true") as run:
        assert "trust_remote_code" in capsys.readouterr().out
        assert (tmp_path / "out" / LOCK_FILE).exists()
        assert signal.getsignal(signal.SIGTERM) == run.stop._request
        assert torch.initial_seed() == 7
    assert signal.getsignal(signal.SIGTERM) == before
    with enter(keep=False, metric_for_best_model="none") as run:
        assert not (tmp_path / "out").exists() and signal.getsignal(signal.SIGTERM) == before
        trainer = make_trainer(tmp_path / "trainer", make_pairs(8))
        run.train(trainer, [Watching()])
    assert {Recorder, Watching, FiniteWatchdog, SilenceWatchdog} < kinds(trainer)
    assert StopOnSignal not in kinds(trainer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error, code", [(ValueError("a"), 1), (SystemExit(EXIT_STOPPED), 0)], ids=str)
def test_wandb_is_closed_with_how_the_run_ended(enter, monkeypatch, error, code):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(type(error)), enter(keep=False):
        raise error
    wandb.finish.assert_called_once_with(exit_code=code)


def test_a_start_records_what_it_starts(tmp_path, twin, enter, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(frame, "open_wandb", lambda args, run_id: opened.append(run_id))
    tokenizer = types.SimpleNamespace(chat_template="{{ strftime_now('%Y') }}")
    with enter() as run:
        run.freeze_date(tokenizer)
        run.start({"train": "a"}, data={"rows": 3})
        assert run.checkpoint is None and not (tmp_path / "out/run.json").exists()
    today = datetime.date.today()
    assert tokenizer.chat_template == f'{{{{ "{today.year}" }}}}'
    assert str(today) in capsys.readouterr().out and not opened
    content = run.record
    assert content["data"] == {"rows": 3} and content["date"] == str(today)
    assert content["fingerprints"] == {"train": "a", "model": model_fingerprint(twin[1])}
    assert content["recipe"] == json.loads(json.dumps(run.recipe.resolved(), default=str))
    with enter(report_to="wandb") as run:
        run.start({"train": "a"})
    assert opened == [run.record["wandb_run_id"]]
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    with enter() as run:  # a later start keeps the first one's day
        (tmp_path / "out/run.json").write_text(json.dumps({"date": "2020-02-03"}))
        run.freeze_date(tokenizer)
    assert run.date == "2020-02-03" and tokenizer.chat_template == '{{ "03 Feb 2020" }}'


def test_a_run_is_stopped_goes_on_is_finished_and_started_once_more(tmp_path, enter, monkeypatch):
    out, uploads = tmp_path / "out", []
    monkeypatch.setattr(export, "push", lambda args: uploads.append((args.hub_model_id, recorded_run(out))) or "URL")
    hub = {"push_to_hub": "true", "hub_model_id": "me/a"}

    # Stopped after its step
    with pytest.raises(SystemExit) as stopped, enter(**hub) as run:
        run.start({"train": "a"})
        trainer, watching = make_run_trainer(run), Watching()
        run.stop.requested = True
        run.train(trainer, [watching])
    assert stopped.value.code == 75
    assert {StopOnSignal, Recorder, Watching, FiniteWatchdog, SilenceWatchdog} < kinds(trainer)
    assert not trainer.args.logging_nan_inf_filter
    assert watching.record["starts"] == 1 and not watching.record["finished"] and not uploads
    marker = marked(out / "checkpoint-1")
    assert all(marker[key] == run.record[key] for key in ("recipe", "fingerprints", "world_size"))

    # Gone on with, and finished
    with enter(**hub) as run:
        run.start({"train": "a"})
        trainer = make_run_trainer(run)
        run.stop.requested = True  # by a signal after the last step: there is nothing left to be stopped
        run.train(trainer)
        assert trainer.state.global_step == 1
        with pytest.raises(ValueError, match="no card"), monkeypatch.context() as broken:
            broken.setattr(export, "write_model_card", mock.Mock(side_effect=ValueError("no card")))
            run.save(trainer, eval_loss=0.25)
        assert recorded_run(out)["results"] == {"eval_loss": 0.25} and not recorded_run(out)["finished"] and not uploads
        run.save(trainer, eval_loss=0.5)
    assert "| eval_loss | 0.5 |" in (out / "README.md").read_text()
    ((name, record),) = uploads
    assert name == "me/a" and record["finished"] and record["starts"] == 2

    # Started once more
    for asked, count in ((hub, 2), ({}, 2)):
        with pytest.raises(SystemExit) as ended, enter(**asked) as run:
            run.start({"train": "a"})
        assert not ended.value.code and len(uploads) == count
    assert recorded_run(out)["starts"] == 2
    with pytest.raises(CheckpointError, match=r"fingerprints\.train: a, now b"), enter() as run:
        run.start({"train": "b"})


def test_a_disk_that_fills_up_while_a_run_trains_or_saves_is_told(tmp_path, enter, monkeypatch):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with enter() as run:
        run.start({"train": "a"})
        trainer = make_run_trainer(run)
        with pytest.raises(FullDiskError, match="none"), monkeypatch.context() as broken:
            broken.setattr(checkpoints, "write_atomically", full)
            run.train(trainer)
        monkeypatch.setattr(export, "write_model_card", full)
        with pytest.raises(FullDiskError):
            run.save(trainer)
    assert len(read_metrics(tmp_path / "out")) == 1


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
    with open(f"{twin[3]}/test.jsonl") as file:  # held-out prompts, of which the cut leaves an end
        asked = [json.loads(line)["prompt"] for line in file]
    ends = [line["prompt"].partition("<|eot_id|>")[0].rpartition(">")[2].strip() for line in samples]
    assert ends[0] and [question.endswith(end) for question, end in zip(asked, ends, strict=False)] == [True, True]
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
