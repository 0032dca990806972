"""`make plan`, and what is refused, or warned of, before a run: memory, masters, disk, lengths that are known."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from rmipo.plan import preflight
from rmipo.plan.memory import GIB, Hardware, Sharding, plan_memory
from rmipo.plan.shapes import Shape, load_config
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.twins import make_twin

ZERO3, FOUR = Sharding("zero3"), Hardware.parse("4x80")
LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def recipe_8b():
    return load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml")


@pytest.mark.parametrize("setting", ["llama3-8b-base", "mistral-7b-instruct"])
def test_settings_fit_four_80_gib_gpus_and_not_four_of_24(setting, capsys):
    recipe = load_recipe(ROOT / f"recipes/{setting}/rmipo.yaml")
    preflight.check_memory(recipe, FOUR, ZERO3)
    assert capsys.readouterr().err == ""
    memory = plan_memory(preflight.shape_of(recipe), preflight.workload_of(recipe), ZERO3, FOUR)
    assert memory.needed == sum(memory.parts.values()) < 79 * GIB
    assert memory.parts["gradients and optimizer"] > 25 * GIB
    with pytest.raises(preflight.PreflightError, match=r"with zero3 on 4 GPUs, found 24"):
        preflight.check_memory(recipe, Hardware(1, 4, 24), ZERO3)


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("dpo", [], {"reference": "cached", "prior": False, "fused_head": True}),
        ("kto", [], {"reference": "cached", "prior": True}),  # the mismatched pairs are scored without gradient
        ("epsilon-dpo", [], {"reference": "logits", "prior": False, "fused_head": False}),
        (None, [], {"reference": "none", "prior": True, "fused_head": True, "checkpoint_every": 2}),
        (None, ["--objective.prior_model=initial"], {"reference": "cached prior", "prior": False}),
        (None, ["--attention=dense"], {"fused_head": False}),
        (None, ["--dtype=float32", "--bf16=true"], {"weight_bytes": 4, "autocast": True}),
        (None, ["--dtype=float32", "--bf16=false"], {"weight_bytes": 4, "autocast": False}),
        (None, ["--activation_checkpointing=false"], {"checkpoint_every": 0}),
    ],
)
def test_what_a_recipe_says_of_memory_and_time(method, overrides, expected):
    overlays = [ROOT / f"recipes/methods/{method}.yaml"] if method else []
    work = preflight.workload_of(load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", overlays, overrides))
    assert {name: getattr(work, name) for name in expected} == expected


def test_an_estimate_that_is_too_large_warns_and_starts(recipe_8b, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    tight = Hardware(1, 4, 43)  # 34 GiB of states, and not all of the rest
    preflight.check_launch(recipe_8b, tight, ZERO3)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "found 43" in warning
    monkeypatch.setenv("RANK", "1")
    preflight.check_launch(recipe_8b, tight, ZERO3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", ["llama3-8b-base/sft", "llama3-8b-base/rmipo"])
def test_bfloat16_weights_without_float32_masters_are_refused(setting, monkeypatch):
    """AdamW at 1e-6 would round most updates of bfloat16 weights to nothing."""
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    path, large = ROOT / f"recipes/{setting}.yaml", Hardware(1, 1, 1000)
    with pytest.raises(preflight.PreflightError, match="dtype: bfloat16"):
        preflight.check_launch(load_recipe(path), large, Sharding("none"))
    preflight.check_launch(load_recipe(path, overrides=["--dtype=float32"]), large, Sharding("none"))
    preflight.check_launch(load_recipe(path), large, ZERO3)
    if not setting.endswith("sft"):
        preflight.check_launch(load_recipe(path, [ROOT / "recipes/adapters/lora.yaml"]), large, Sharding("none"))


def test_disk_is_checked_for_what_a_run_writes_and_has_not_yet_written(tmp_path):
    free = preflight.check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(preflight.PreflightError, match="output_dir: "):
        preflight.check_disk(tmp_path / "not" / "there", free * 2)
    (tmp_path / "checkpoint-1").mkdir()
    with open(tmp_path / "checkpoint-1" / "optimizer.pt", "wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    preflight.check_disk(tmp_path, 2**40 + free // 2)
    with pytest.raises(preflight.PreflightError, match="output_dir: "):
        preflight.check_disk(tmp_path, 2**40 + 2 * free)
    shape = Shape.of(load_config(LLAMA3_8B))
    for changes, checkpoints in (
        ([], 2),  # it makes two, at each half
        (["--save_total_limit=null", "--save_steps=0.05"], 20),
        (["--save_total_limit=3", "--save_steps=0.05"], 4),
        (["--save_steps=100"], 3),  # two are kept, one is being written
    ):
        recipe = load_recipe(ROOT / "recipes/llama3-8b-base/rmipo.yaml", overrides=changes)
        # The model in bfloat16; a checkpoint also has the float32 weights and Adam's two moments.
        assert preflight.disk_needed(recipe, shape, ZERO3) == 8_030_261_248 * (2 + checkpoints * (2 + 12)), changes


def test_the_smallest_gpu_of_a_machine_counts(monkeypatch):
    gpus = [SimpleNamespace(total_memory=size * GIB) for size in (80, 40, 80)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: gpus[i])
    assert Hardware.here() == Hardware(1, 3, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2", "zero3-offload", "ddp"])
def test_a_training_process_sees_how_it_was_launched(name):
    """Through accelerate itself, on the CPU: `sharding_of` has only what that leaves in the environment."""
    show = (
        "from transformers import TrainingArguments; from rmipo.plan import preflight\n"
        "from rmipo.recipe.load import load_recipe\n"
        "args = TrainingArguments('unused', use_cpu=True)\n"
        "print('seen:', preflight.sharding_of(args))\n"
        "args.use_cpu = False\n"
        "preflight.Hardware.here = lambda: preflight.Hardware(1, 1, 4)\n"
        "try: preflight.check_run(load_recipe('recipes/llama3-8b-instruct/rmipo.yaml'), args)\n"
        "except ValueError as error: print('said:', error)\n"
    )
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1"]
    launch += ["--config_file", f"configs/accelerate/{name}.yaml", "--no_python", sys.executable, "-c", show]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"seen: {Sharding.load(ROOT / f'configs/accelerate/{name}.yaml')}\n" in done.stdout, done.stderr[-3000:]
    # As in a training process: under ZeRO-3, models that are made there would be divided over the ranks.
    said = {
        "ddp": r"^said: .*dtype: bfloat16",
        "zero3-offload": r"^warning: .*needs \d+ GiB per GPU with zero3 on 1 GPUs, found 4 ",
    }.get(name, r"^said: .*: needs \d+ GiB per GPU with \w+ on 1 GPUs, found 4 ")
    assert re.search(said, done.stdout + done.stderr, re.MULTILINE), done


def test_what_a_training_process_cannot_do_is_refused(recipe_8b, monkeypatch, tmp_path):
    args, on_cpu = TrainingArguments(str(tmp_path)), TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(Hardware, "here", lambda: Hardware(1, 2, 24))  # there is no GPU to look at
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(preflight.PreflightError, match="dtype: bfloat16"):
        preflight.check_run(recipe_8b, args)
    preflight.check_run(recipe_8b, on_cpu)
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "8")  # a process knows its nodes
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "check_launch", lambda recipe, hardware, sharding: seen.append(hardware))
        preflight.check_run(recipe_8b, args)
    assert seen == [Hardware(4, 2, 24)]
    args._n_gpu = 4  # transformers would copy the model to all of them in every step
    with pytest.raises(preflight.PreflightError, match="4 GPUs"):
        preflight.check_run(recipe_8b, args)


@pytest.mark.parametrize("change", ["--memory_check=false", "--optim=adamw_8bit"])
def test_the_estimate_refuses_nothing_where_it_is_switched_off_or_for_another_optimizer(change, monkeypatch):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    small = (Hardware(1, 4, 8), ZERO3)
    path = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"
    with pytest.raises(preflight.PreflightError, match="found 8 "):
        preflight.check_launch(load_recipe(path), *small)
    preflight.check_launch(load_recipe(path, overrides=[change]), *small)


def make_plan(**variables):
    ended = run_here("plan", env={"MODEL": "llama3-8b-instruct", **variables})
    return ended.code, ended.out + ended.err


def test_plan_prints_every_part_and_follows_the_length_that_the_recipe_asks_for():
    code, text = make_plan(GPUS="8x80")
    assert code == 0
    parts = ("parameters", "gradients and optimizer", "gathered", "activations", "LM head", "Disk", "GiB of 79.1: fits")
    assert [part for part in parts if part not in text] == []
    assert "8 GPUs in sequences of at most 8192 tokens" in text and "Steps: 478" in text  # 61135 pairs, 128 at a time
    assert "Examples: 61135, assumed; EXAMPLES= says otherwise" in text
    hours = re.search(r"^Hours of the training: (\S+) to (\S+),", text, re.MULTILINE)
    assert 0.5 < float(hours[1]) < float(hours[2]) < 2
    _, text = make_plan(MODEL="llama3-8b-base", GPUS="8x80", ARGS="--max_train_samples=1280")
    assert "Examples: 1280, in the training data" in text and "Steps: 10," in text
    _, text = make_plan(GPUS="8x80", EXAMPLES="1000")
    assert "Examples: 1000, as EXAMPLES says" in text and "Steps: 8," in text
    _, text = make_plan(MODEL="llama3-8b-base", STAGE="sft", GPUS="8x80", ARGS="--packing=false --max_steps=5")
    assert "Steps: 5," in text


def test_plan_of_a_cpu_setting_speaks_of_the_cpu_and_one_that_cannot_fit_fails(tmp_path):
    make_rows = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    code, text = make_plan(MODEL="tiny", ARGS=shlex.join(make_rows))
    assert code == 0 and "CPU with" in text and "Hours: not estimated" in text
    code, text = make_plan(GPUS="4x24", METHOD="dpo")
    assert code == 1 and "DOES NOT FIT" in text


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"GPUS": "8"}, "GPUS=8"),
        ({"NODES": "2"}, "GPUS=8x80"),
        ({"GPUS": "8x80", "EXAMPLES": "all"}, "EXAMPLES='all'"),
        ({"GPUS": "8x80", "TFLOPS": "fast"}, "TFLOPS='fast'"),
        ({"GPUS": "8x80", "SHARDING": "ddp"}, "dtype: bfloat16"),
    ],
)
def test_plan_refuses_what_it_cannot_plan_for(variables, named):
    code, text = make_plan(**variables)
    assert code == 2 and named in text
