"""What a run's files hold after a kill: the lines up to the checkpoint, and each evaluation once."""

import json
import types
from pathlib import Path

from transformers import TrainerControl, TrainerState

from rmipo.record import WITHOUT_EFFECT, append_metrics, differences, keep_metrics, read_metrics, run_identity
from rmipo.run.callbacks import Recorder


def state_at(step):
    return TrainerState(global_step=step, is_world_process_zero=True)


def test_lines_after_the_checkpoint_are_made_again(tmp_path):
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"step": step, "loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # where the kill came
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [line["step"] for line in keep_metrics(tmp_path, 2)] == [1, 2]
    append_metrics(tmp_path, {"step": 3, "loss": 0.25})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()][-1] == {"step": 3, "loss": 0.25} and text.endswith("\n")
    append_metrics(tmp_path, {"step": 0, "eval_loss": 0.7})
    assert keep_metrics(tmp_path, 0) == [] == read_metrics(tmp_path)  # an evaluation before the first step too


def test_an_evaluation_is_written_once_and_the_summary_never(tmp_path):
    file, arguments = Recorder(), types.SimpleNamespace(output_dir=str(tmp_path))
    append_metrics(tmp_path, {"step": 4, "eval_loss": 1.0})
    file.on_train_begin(arguments, state_at(4), None)
    file.on_log(arguments, state_at(4), None, logs={"eval_loss": 1.0})  # a resumed run evaluates its checkpoint again
    file.on_log(arguments, state_at(5), None, logs={"loss": 0.5})
    for _ in range(2):  # after the last step, in training and then by the script
        file.on_log(arguments, state_at(5), None, logs={"eval_loss": 0.9})
    file.on_log(arguments, state_at(5), None, logs={"train_runtime": 3.0, "train_loss": 0.5})
    assert read_metrics(tmp_path) == [
        {"step": 4, "eval_loss": 1.0},
        {"step": 5, "loss": 0.5},
        {"step": 5, "eval_loss": 0.9},
    ]


def test_a_line_is_logged_with_each_checkpoint():
    for save in (True, False):
        control = TrainerControl(should_save=save)
        Recorder().on_step_end(None, TrainerState(epoch=0.5), control)
        assert control.should_log is save
        control = TrainerControl(should_save=save)
        Recorder().on_epoch_end(None, None, control)  # save_strategy: epoch
        assert control.should_log is save


def test_what_may_change_between_the_starts_of_a_run():
    """Written out a second time: a key that is added there by mistake lets a resumed run go on as another one."""
    free = "ddp_timeout memory_check save_total_limit "
    free += "dataset_num_proc dataloader_num_workers report_to run_name push_to_hub hub_model_id hub_private_repo "
    free += "hub_revision"
    assert {key.removeprefix("recipe.") for key in WITHOUT_EFFECT} == set(free.split())
    recipes = ({"recipe": dict.fromkeys([*free.split(), "max_grad_norm"], value)} for value in (1, 2))
    assert differences(*recipes) == ["recipe.max_grad_norm: 1, now 2"]


def test_differences_are_told_by_their_place_those_of_data_last():
    def identity(value):
        recipe = {"objective": {"report_to": value}, "beta": value}
        return {"recipe": recipe, "fingerprints": {"report_to": value}, "world_size": value}

    one, other = identity(1), identity(2)
    assert differences({"recipe": {}}, {"recipe": {"beta": 2}}) == ["recipe.beta: None, now 2"]
    places = ["recipe.beta", "recipe.objective.report_to", "world_size", "fingerprints.report_to"]
    assert differences(one, other) == [f"{place}: 1, now 2" for place in places]


def test_an_identity_equals_what_is_read_back_from_its_file():
    identity = run_identity({"betas": (0.9, 0.95), "path": Path("a/b"), 3: None}, {"train": "a"}, 2)
    recipe = {"betas": [0.9, 0.95], "path": "a/b", "3": None}
    assert identity == {"recipe": recipe, "fingerprints": {"train": "a"}, "world_size": 2}
