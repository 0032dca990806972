"""`make plan`, and what is refused, or warned of, before a run: memory, masters, disk, lengths that are known."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

from rmipo.plan import preflight
from rmipo.plan.memory import GIB, Hardware, Shape, Sharding, load_config, plan_memory
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here

ZERO3, FOUR = Sharding("zero3"), Hardware.parse("4x80")


RECIPE = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"


@pytest.fixture
def recipe_8b():
    return load_recipe(RECIPE)


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("dpo", [], {"scores_pairs": True, "scores_responses": False, "fused_head": True}),
        ("kto", [], {"scores_pairs": True, "scores_responses": True}),  # mismatched pairs
        ("epsilon-dpo", [], {"reference_logits": True, "scores_pairs": True, "fused_head": False}),
        (None, [], {"scores_pairs": False, "scores_responses": True, "fused_head": True, "checkpoint_every": 2}),
        (None, ["--attention=dense"], {"fused_head": False}),
        (None, ["--dtype=float32", "--bf16=true"], {"weight_bytes": 4, "compute_bytes": 2}),
        (None, ["--activation_checkpointing=false"], {"checkpoint_every": 0}),
        (None, ["--max_tokens_per_micro_batch=1000"], {"longest": 2 * 2048}),  # a pair can't be split
        (None, ["--max_tokens_per_micro_batch=6000"], {"longest": 6000}),
        (None, ["--max_tokens_per_micro_batch=null", "--per_device_train_batch_size=2"], {"longest": 2 * 2 * 2048}),
    ],
)
def test_what_a_recipe_says_of_memory_and_time(method, overrides, expected):
    overlays = [ROOT / f"recipes/methods/{method}.yaml"] if method else []
    work = preflight.workload_of(load_recipe(RECIPE, overlays, overrides))
    assert {name: getattr(work, name) for name in expected} == expected


@pytest.fixture
def enough_disk(monkeypatch):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)


def test_an_8b_model_fits_four_gpus_of_80_gib_and_not_of_24(recipe_8b, enough_disk, capsys):
    preflight.check_launch(recipe_8b, FOUR, ZERO3)
    assert capsys.readouterr().err == ""
    memory = plan_memory(preflight.shape_of(recipe_8b), preflight.workload_of(recipe_8b), ZERO3, FOUR)
    assert sum(memory.values()) < 79 * GIB and memory["gradients and optimizer"] > 25 * GIB
    with pytest.raises(preflight.PreflightError, match="found 24"):
        preflight.check_launch(recipe_8b, Hardware(4, 24), ZERO3)
    preflight.check_launch(recipe_8b, Hardware(4, 43), ZERO3)  # 34 GiB of states, and not all of the rest
    assert "found 43" in capsys.readouterr().err
    for change in ("--memory_check=false", "--optim=adamw_8bit"):
        preflight.check_launch(load_recipe(recipe_8b.path, overrides=[change]), Hardware(4, 8), ZERO3)


@pytest.mark.parametrize("setting", ["llama3-8b-base/sft", "llama3-8b-base/rmipo"])
def test_bfloat16_weights_without_float32_masters_are_refused(setting, enough_disk):
    """AdamW at 1e-6 would round most updates of bfloat16 weights to nothing."""
    path, large = ROOT / f"recipes/{setting}.yaml", Hardware(1, 1000)
    with pytest.raises(preflight.PreflightError, match="dtype: bfloat16"):
        preflight.check_launch(load_recipe(path), large, Sharding("none"))
    preflight.check_launch(load_recipe(path, overrides=["--dtype=float32"]), large, Sharding("none"))
    if not setting.endswith("sft"):
        preflight.check_launch(load_recipe(path, [ROOT / "recipes/adapters/lora.yaml"]), large, Sharding("none"))


def test_disk_is_checked_for_what_a_run_writes_and_has_not_yet_written(tmp_path):
    free = preflight.check_disk(tmp_path / "not" / "there", 1)
    (tmp_path / "checkpoint-1").mkdir()
    with open(tmp_path / "checkpoint-1" / "optimizer.pt", "wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    preflight.check_disk(tmp_path, 2**40 + free // 2)
    with pytest.raises(preflight.PreflightError, match="output_dir: "):
        preflight.check_disk(tmp_path, 2**40 + 2 * free)
    shape = Shape.of(load_config("meta-llama/Meta-Llama-3-8B-Instruct"))
    for changes, checkpoints in (
        ([], 2),  # it makes two, at each half
        (["--save_total_limit=null", "--save_steps=0.05"], 20),
        (["--save_steps=100"], 3),  # two are kept, one is being written
    ):
        recipe = load_recipe(ROOT / "recipes/llama3-8b-base/rmipo.yaml", overrides=changes)
        # The model in bfloat16; a checkpoint also has the float32 weights and Adam's two moments.
        assert preflight.disk_needed(recipe, shape, ZERO3) == 8_030_261_248 * (2 + checkpoints * (2 + 12)), changes
    assert preflight.disk_needed(recipe, shape, Sharding("fsdp2")) == 8_030_261_248 * (4 + 3 * (4 + 12))


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
        "preflight.Hardware.here = lambda: preflight.Hardware(1, 4)\n"
        "try: preflight.check_run(load_recipe('recipes/llama3-8b-instruct/rmipo.yaml'), args)\n"
        "except ValueError as error: print('said:', error)\n"
    )
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1"]
    launch += ["--config_file", f"configs/accelerate/{name}.yaml", "--no_python", sys.executable, "-c", show]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"seen: {Sharding.load(ROOT / f'configs/accelerate/{name}.yaml')}\n" in done.stdout, done.stderr[-3000:]
    said = {"ddp": "said: .*dtype: bfloat16", "zero3-offload": "warning: .*on 1 GPUs, found 4 "}
    assert re.search(said.get(name, r"said: .* with \w+ on 1 GPUs, found 4 "), done.stdout + done.stderr), done


def test_one_process_of_several_gpus_is_refused_and_a_cpu_is_not_checked(recipe_8b, monkeypatch, tmp_path):
    args, on_cpu, seen = TrainingArguments(str(tmp_path)), TrainingArguments(str(tmp_path), use_cpu=True), []
    monkeypatch.setattr(Hardware, "here", lambda: Hardware(2, 24))  # there is no GPU to look at
    monkeypatch.setattr(preflight, "check_launch", lambda recipe, hardware, sharding: seen.append(hardware))
    monkeypatch.setenv("WORLD_SIZE", "8")  # on several nodes
    preflight.check_run(recipe_8b, args)
    preflight.check_run(recipe_8b, on_cpu)
    assert seen == [Hardware(8, 24)]
    args._n_gpu = 4
    with pytest.raises(preflight.PreflightError, match="4 GPUs"):
        preflight.check_run(recipe_8b, args)


def make_plan(**variables):
    ended = run_here("plan", env={"MODEL": "llama3-8b-instruct", **variables})
    return ended.code, ended.out + ended.err


def test_plan_prints_every_part_and_follows_the_length_that_the_recipe_asks_for():
    code, text = make_plan(GPUS="8x80")
    assert code == 0
    parts = "parameters", "gradients and optimizer", "activations", "LM head", "Disk", "79.1: fits", "8192 tokens"
    parts += "Steps: 478,", "Examples: 61135,", "Hours"
    assert [part for part in parts if part not in text] == []
    _, text = make_plan(MODEL="llama3-8b-base", STAGE="sft", GPUS="8x80", EXAMPLES="1000", ARGS="--packing=false")
    assert "Examples: 1000," in text and "Steps: 8," in text
    code, text = make_plan(GPUS="4x24", METHOD="dpo")
    assert code == 1 and "DOES NOT FIT" in text
    own = "--model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --dtype bfloat16"  # of a recipe that trains on a CPU here
    code, text = make_plan(MODEL="smollm2-135m-instruct", GPUS="4x80", ARGS=own)
    assert code == 0 and "Meta-Llama-3-8B-Instruct, 8.03 B" in text


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"GPUS": "8"}, "GPUS=8"),
        ({"GPUS": "8x80", "EXAMPLES": "all"}, "EXAMPLES='all'"),
        ({"GPUS": "8x80", "SHARDING": "ddp"}, "dtype: bfloat16"),
        ({"GPUS": "3x80"}, "global_batch_size"),
        ({"MODEL": "tiny"}, "CPU"),
    ],
)
def test_plan_refuses_what_it_cannot_plan_for(variables, named):
    code, text = make_plan(**variables)
    assert code == 2 and named in text
