"""`make train`: what it runs, what it refuses, and a sharded run of two processes as users start it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rmipo.launch import choices, pipeline, train
from rmipo.recipe.load import ConfigError, load_recipe
from tests.helpers.programs import run_here
from tests.helpers.twins import assert_same_run, changed, finish, last_step, make_twin


def make(repository, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=repository, env=environment, capture_output=True, text=True)


def command(env, stage="rmipo", gpus=4):
    model, names = choices.choose_stages(env)
    (step,) = [step for step in pipeline.load_steps(model, names, env) if step.stage == stage]
    return step.command(gpus)


def test_method_data_and_args_become_arguments():
    env = {"MODEL": "mistral-7b-base", "STAGE": "rmipo", "METHOD": "dpo", "DATA": "data/my pairs.jsonl.gz"}
    env["ARGS"] = "--learning_rate 1e-6 --overlay recipes/ablations/table5-simpo.yaml --run_name 'a b'"
    env["SHARDING"] = "zero3-offload"
    words = command(env, gpus=2)
    assert words[2:] == [
        *("--config_file", "configs/accelerate/zero3-offload.yaml", "--num_processes", "2"),
        *("scripts/preference.py", "--config", "recipes/mistral-7b-base/rmipo.yaml"),
        *("--overlay", "recipes/methods/dpo.yaml", "--overlay", "recipes/ablations/table5-simpo.yaml"),
        *("--dataset_name", "data/my pairs.jsonl.gz", "--output_dir", "outputs/mistral-7b-base/dpo-my-pairs"),
        *("--learning_rate", "1e-6", "--run_name", "a b"),
    ]
    assert load_recipe(words[8], [words[10], words[12]], words[13:]).values["learning_rate"] == 1e-6
    words = command({"MODEL": "llama3-8b-instruct", "METHOD": "dpo", "ARGS": "--output_dir=elsewhere"})
    assert [word for word in words if "output_dir" in word] == ["--output_dir=elsewhere"]


@pytest.mark.parametrize("model", ["mistral-7b-base", "tiny"])
def test_data_are_the_pairs_of_the_preference_stage_alone(model):
    env = {"MODEL": model, "DATA": "my_pairs.jsonl"}
    steps = {step.stage: step for step in pipeline.load_steps(*choices.choose_stages(env), env)}
    plain = {step.stage: step for step in pipeline.load_steps(*choices.choose_stages(env), {"MODEL": model})}
    assert steps["sft"] == plain["sft"] and steps.get("world") == plain.get("world")
    values = steps["rmipo"].recipe.values
    assert (values["dataset_name"], values["output_dir"]) == ("my_pairs.jsonl", f"outputs/{model}/rmipo-my-pairs")
    if model == "tiny":  # whose own texts are short
        assert values["max_length"] == 512 and plain["rmipo"].recipe.values["max_length"] == 128


def test_adapters_have_a_folder_of_their_own():
    """Else METHOD=dpo with an adapter would be the full run's folder."""
    for env, folder in (
        ({"MODEL": "llama3-8b-instruct"}, "llama3-8b-instruct/rmipo-lora"),
        ({"MODEL": "llama3-8b-instruct", "METHOD": "dpo"}, "llama3-8b-instruct/dpo-lora"),
        ({"MODEL": "llama3-8b-instruct-hh-helpful"}, "llama3-8b-instruct-hh-helpful/rmipo-lora"),
        ({"MODEL": "mistral-7b-instruct", "DATA": "my.jsonl"}, "mistral-7b-instruct/rmipo-my-lora"),
    ):
        words = command({**env, "ARGS": "--overlay recipes/adapters/lora.yaml"})
        assert words[words.index("--output_dir") + 1] == f"outputs/{folder}"
    adapters = command({"MODEL": "llama3-8b-instruct", "ARGS": "--use_peft"})
    assert "configs/accelerate/ddp.yaml" in adapters
    words = command({"MODEL": "tiny", "ARGS": "--seed 1"})  # on a CPU
    assert Path(words[0]).name == "python"
    assert words[1:] == ["scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml", "--seed", "1"]


def test_arguments_are_of_the_last_stage():
    chosen = {name: choices.choose_stages({"MODEL": name})[1] for name in ("llama3-8b-base", "llama3-8b-instruct")}
    assert chosen == {"llama3-8b-base": ["sft", "rmipo"], "llama3-8b-instruct": ["rmipo"]}
    env = {"MODEL": "llama3-8b-base", "ARGS": "--learning_rate 1e-6"}
    assert "1e-6" in command(env) and "1e-6" not in command(env, stage="sft")
    assert "1e-6" in command(env | {"STAGE": "sft"}, stage="sft")


@pytest.mark.parametrize(("visible", "gpus", "named"), [(4, "3", "3"), (2, "4", "GPUS=4"), (0, "", "none is visible")])
def test_gpus_that_do_not_divide_the_batch_or_are_absent_stop_before_anything_runs(monkeypatch, visible, gpus, named):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr(train, "Program", lambda: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=named):
        train.train({"MODEL": "llama3-8b-instruct", "GPUS": gpus})


@pytest.fixture(autouse=True)
def own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def launch(**env):
    return run_here("launch", env=env)


def test_dry_runs_print_recipe_batch_and_command_and_start_nothing():
    code, output, _ = launch(MODEL="llama3-8b-instruct", DRY="1", GPUS="8", METHOD="simpo")
    lines = output.splitlines()
    assert code == 0
    assert "learning_rate: 1.0e-06" in lines and "  gamma: 1.375" in lines
    assert "# batch: 128 over 8 processes" in lines
    assert lines[-2].endswith(
        "--num_processes 8 scripts/preference.py --config recipes/llama3-8b-instruct/rmipo.yaml "
        "--overlay recipes/methods/simpo.yaml --output_dir outputs/llama3-8b-instruct/simpo"
    )
    code, output, _ = launch(MODEL="mistral-7b-base", DRY="1")
    assert code == 0 and [line for line in output.splitlines() if line.startswith("## ")] == ["## sft", "## rmipo"]
    assert "# model_name_or_path: alignment-handbook/zephyr-7b-sft-full, because outputs/mistral-7b-base/sft" in output
    given = {"NODES": "4", "GPUS": "8x80", "SBATCH_ARGS": "--qos=long --comment='a b'"}
    code, output, _ = launch(MODEL="llama3-70b-instruct", DRY="1", SLURM="1", **given)
    lines = output.splitlines()
    assert code == 0
    assert "# batch: 128 over 32 processes" in lines
    assert lines[-2] == (
        "sbatch --parsable --nodes=4 --job-name=llama3-70b-instruct-rmipo --gpus-per-node=8 --dependency=singleton "
        "--qos=long '--comment=a b' scripts/launch.slurm "
        "configs/accelerate/zero3.yaml scripts/preference.py --config recipes/llama3-70b-instruct/rmipo.yaml"
    )
    code, output, _ = launch(MODEL="tiny", STAGE="rmipo", DRY="1", SLURM="1", NODES="2")
    assert code == 0 and "# batch: 32 over 2 processes" in output
    assert "--nodes=2 --job-name=tiny-rmipo --dependency=singleton scripts/launch.slurm cpu scripts/pref" in output


def test_stages_are_queued_one_after_the_other(tmp_path, monkeypatch):
    """By a stand-in for sbatch, which writes down what it was given and hands out job ids."""
    sbatch, jobs = tmp_path / "sbatch", tmp_path / "jobs"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {jobs}\necho "$(wc -l < {jobs});cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, output, errors = launch(MODEL="llama3-8b-base", SLURM="1", GPUS="8", METHOD="dpo")
    assert code == 0, errors
    first, second = jobs.read_text().splitlines()
    assert "--job-name=llama3-8b-base-sft --gpus-per-node=8 --dependency=singleton scripts/launch.slurm" in first
    assert first.endswith("configs/accelerate/zero3.yaml scripts/sft.py --config recipes/llama3-8b-base/sft.yaml")
    dependency = "--dependency=afterok:1,singleton --kill-on-invalid-dep=yes"
    assert f"--job-name=llama3-8b-base-dpo --gpus-per-node=8 {dependency}" in second
    assert "## rmipo: job 2, log outputs/slurm/2.log" in output


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_that_saved_ends_with_code_75(tmp_path, processes):
    """`processes` > 1: the launcher in between turns the program's code into 1."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        f"    marker = pathlib.Path({str(tmp_path)!r}) / 'checkpoint-3' / 'complete.json'\n"
        "    marker.parent.mkdir()\n"
        "    marker.write_text('{\"step\": 3}')\n"
        f"    sys.exit(75 if {processes} == 1 else 1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    assert train.Program().run([sys.executable, str(program)], str(tmp_path)) == 75


def test_a_stop_during_the_last_moments_of_a_stage_keeps_the_next_from_starting(monkeypatch):
    """The first stage of tiny gets no time to end differently: its program is one that ends well after a SIGTERM."""
    ending_well = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(pipeline.Step, "command", lambda *_: [sys.executable, "-c", ending_well])
    code, output, errors = launch(MODEL="tiny")
    assert code == 75
    assert [line for line in output.splitlines() if line.startswith("## ")] == ["## world"]
    assert errors.startswith("stopped before sft;")


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, ("MODEL", "llama3-8b-instruct")),
        ({"MODEL": "methods"}, ("MODEL='methods'", "llama3-8b-instruct")),
        ({"MODEL": "llama3-8b-instruct", "STAGE": "sft"}, ("STAGE='sft'", "rmipo\n  all")),
        ({"MODEL": "tiny", "ARGS": "--overlay"}, ("--overlay",)),
        ({"MODEL": "tiny", "ARGS": "--overlay none.yaml"}, ("none.yaml",)),
        ({"MODEL": "tiny", "ARGS": "--seed x", "DRY": "1"}, ("seed is 'x'",)),
        ({"MODEL": "tiny", "METHOD": "simp0"}, ("METHOD='simp0'", "simpo")),
        ({"MODEL": "tiny", "NODES": "0"}, ("NODES='0'",)),
        ({"MODEL": "tiny", "GPUS": "4x"}, ("GPUS='4x'",)),
        ({"MODEL": "llama3-70b-instruct", "SLURM": "1", "NODES": "4"}, ("GPUS is not set",)),
        ({"MODEL": "tiny", "NODES": "2"}, ("NODES=2",)),
        ({"MODEL": "tiny", "SHARDING": "zero9"}, ("SHARDING='zero9'",)),
        ({"MODEL": "tiny", "STAGE": "sft", "DATA": "my.jsonl"}, ("DATA=my.jsonl",)),
        ({"MODEL": "tiny", "STAGE": "rmipo", "SLURM": "1", "PATH": ""}, ("SLURM=1",)),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(env, named):
    code, output, errors = launch(**env)
    assert (code, output) == (2, "") and all(part in errors for part in named)


def test_what_is_given_to_make_reaches_the_recipe(repository):
    given = ("MODEL=tiny", "STAGE=rmipo", "DRY=1", "ARGS=--run_name 'a b' --seed=3", "DATA=my pairs.jsonl")
    result = make(repository, "train", *given)
    assert result.returncode == 0, result.stderr
    for line in ("run_name: a b", "seed: 3", "dataset_name: my pairs.jsonl"):
        assert f"{line}\n" in result.stdout
    assert not (repository / "outputs").exists()


@pytest.mark.parametrize("queued", ["0", "1"])
@pytest.mark.parametrize("push", [False, True])
def test_a_finished_run_is_started_again_to_compare_data_and_model_and_queued_only_to_upload(monkeypatch, push, queued):
    started = []

    class Program:
        stopped_at = None

        def run(self, command, *rest):
            started.append(command)
            return 0

    overrides = ["--push_to_hub", "--hub_model_id=me/tiny"] if push else []
    recipe = load_recipe("recipes/tiny/rmipo.yaml", overrides=overrides)
    monkeypatch.setattr(pipeline.Step, "is_done", lambda self: True)
    monkeypatch.setattr(train, "load_steps", lambda *_: [pipeline.Step("rmipo", [], recipe)])
    monkeypatch.setattr(train, "Program", Program)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(train, "submit", lambda *job, after: started.append(job) or ("7", "log"))
    assert train.train({"MODEL": "tiny", "STAGE": "rmipo", "SLURM": queued}) == 0
    assert len(started) == (push or queued == "0")


SETTING_ALONE = ("launch", "plan", "doctor", "compare", "sweep", "smoke", "pairs", "online")
MODEL_OR_FOLDER = ("evaluate", "samples", "table", "figure", "reproduce")


@pytest.mark.parametrize("script", SETTING_ALONE + MODEL_OR_FOLDER)
def test_a_model_that_is_none_is_refused(script):
    done = run_here(script, env={"MODEL": "llama3", "N": "7", "TABLE": "7"})
    assert done.code == 2 and done.out == ""
    assert re.search("MODEL='?llama3'? (is|has no)", done.err) and "llama3-8b-instruct" in done.err, done.err


@pytest.mark.parametrize(
    ("script", "variable"),
    [("online", "DATA"), ("pairs", "DRY"), ("compare", "DATA"), ("sweep", "SLURM"), ("smoke", "DATA")],
)
def test_a_variable_that_a_command_cannot_follow_is_refused(script, variable):
    done = run_here(script, env={"MODEL": "tiny", "METHOD": "simpo", variable: "1"})
    assert done.code == 2 and done.err.startswith(f"error: {variable}: ")


SETTING = "base: ../tiny/rmipo.yaml\noutput_dir: outputs/twin/rmipo\n"


@pytest.mark.slow
def test_a_zero3_run_is_stopped_and_goes_on_by_the_same_command(repository, tmp_path):
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    overrides = changed(overrides, max_steps=12, save_strategy="steps", save_steps=12, global_batch_size=8)
    finish(overrides, tmp_path / "whole", 2)
    (repository / "recipes/twin").mkdir()
    (repository / "recipes/twin/rmipo.yaml").write_text(SETTING)
    out = repository / "outputs/twin/rmipo"
    environment = os.environ | {"PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"}
    environment |= {"MODEL": "twin", "SHARDING": "zero3", "GPUS": "2", "ARGS": " ".join(overrides)}

    def start():
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["make", "train"], cwd=repository, env=environment, **streams)

    run = start()
    while not last_step(out) >= 3:
        assert run.poll() is None, run.stdout.read()
    (launcher,) = psutil.Process(run.pid).children()
    launcher.send_signal(signal.SIGTERM)
    output, _ = run.communicate()
    assert "--config_file configs/accelerate/zero3.yaml --num_processes 2" in output
    assert "stopped by a signal at step" in output and "rmipo ended with exit code 75" in output, output[-3000:]
    assert not json.loads((out / "run.json").read_text())["finished"]
    run = start()
    output, _ = run.communicate()
    assert run.returncode == 0 and "resuming from" in output, output[-3000:]
    assert json.loads((out / "run.json").read_text())["starts"] == 2
    assert_same_run(out, tmp_path / "whole")
