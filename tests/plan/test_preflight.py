"""What is refused, or warned of, before a run: memory, masters, disk, lengths that are known."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GemmaConfig, TrainingArguments

from rmipo.plan import lengths, preflight
from rmipo.plan.memory import GIB, Hardware, Shape, Sharding, plan_memory
from rmipo.plan.shapes import load_config
from rmipo.recipe.load import load_recipe
from rmipo.run import frame
from tests.helpers.paths import ROOT
from tests.helpers.twins import make_twin

ZERO3, FOUR = Sharding("zero3"), Hardware(1, 4, 80)
LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def recipe_8b():
    return load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml")


def memory_of(recipe, hardware=FOUR, sharding=ZERO3):
    return plan_memory(preflight.shape_of(recipe), preflight.run_of(recipe), sharding, hardware)


@pytest.mark.parametrize("setting", ["llama3-8b-base", "llama3-8b-instruct", "mistral-7b-base", "mistral-7b-instruct"])
def test_settings_fit_four_80_gib_gpus_and_not_four_of_24(setting):
    recipe = load_recipe(ROOT / f"recipes/{setting}/rmipo.yaml")
    assert preflight.check_fit(recipe, FOUR, ZERO3) is None
    memory = memory_of(recipe)
    assert memory.needed == sum(memory.parts.values()) < 80 * GIB
    assert memory.parts["gradients and optimizer"] > 25 * GIB
    with pytest.raises(
        preflight.PreflightError,
        match=r"needs \d+ GiB per GPU with zero3 on 4 GPUs, found 24 .* states alone do not fit: use more GPUs",
    ):
        preflight.check_fit(recipe, Hardware(1, 4, 24), ZERO3)


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
        (None, [], {"weight_bytes": 2, "autocast": False}),
        (None, ["--activation_checkpointing=false"], {"checkpoint_every": 0}),
    ],
)
def test_what_a_recipe_says_of_memory_and_time(method, overrides, expected):
    overlays = [ROOT / f"recipes/methods/{method}.yaml"] if method else []
    run = preflight.run_of(load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", overlays, overrides))
    assert {name: getattr(run, name) for name in expected} == expected


def test_the_smallest_and_the_oldest_gpu_of_a_machine_count(monkeypatch):
    """There is no GPU in the tests."""
    gpus = [(80 * GIB, 9), (40 * GIB, 9), (80 * GIB, 8)]
    gpus = [SimpleNamespace(total_memory=size, major=major, minor=0) for size, major in gpus]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: gpus[i])
    hardware = preflight.local_hardware()
    assert (hardware.nodes, hardware.gpus_per_node, hardware.gib) == (1, 3, 40) and hardware.host_gib > 0.5
    assert hardware.capability == (8, 0)


def test_a_training_process_knows_its_nodes(recipe_8b, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 8, 80, 500))
    monkeypatch.setattr(preflight, "check_launch", lambda recipe, hardware, sharding: seen.append(hardware))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    preflight.check_run(recipe_8b, TrainingArguments(str(tmp_path)))
    assert seen == [Hardware(2, 4, 80, 500)]


def test_an_estimate_that_is_too_large_warns_and_starts(recipe_8b, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    tight = Hardware(1, 4, 43)  # 34 GiB of states, and not all of the rest
    preflight.check_launch(recipe_8b, tight, ZERO3)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "found 43" in warning and "max_tokens_per_micro_batch" in warning
    monkeypatch.setenv("RANK", "1")
    preflight.check_launch(recipe_8b, tight, ZERO3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", ["llama3-8b-base/sft", "llama3-8b-base/rmipo"])
def test_bfloat16_weights_without_float32_masters_are_refused(setting, monkeypatch):
    """AdamW at 1e-6 would round most updates of bfloat16 weights to nothing."""
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    path, large = ROOT / f"recipes/{setting}.yaml", Hardware(1, 1, 1000)
    with pytest.raises(preflight.PreflightError, match=r"dtype: bfloat16 .* round to zero\. Set dtype: float32"):
        preflight.check_launch(load_recipe(path), large, Sharding("none"))
    preflight.check_launch(load_recipe(path, overrides=["--dtype=float32"]), large, Sharding("none"))
    for kind in ("zero3", "zero2", "fsdp2"):
        preflight.check_launch(load_recipe(path), large, Sharding(kind))
    adapters = [ROOT / "recipes/adapters/lora.yaml"] * (not setting.endswith("sft"))
    for overlay in adapters:
        preflight.check_launch(load_recipe(path, [overlay]), large, Sharding("none"))


def test_updates_of_bfloat16_weights_do_round_away():
    """The reason for that refusal: a typical weight, the recipes' learning rate, 100 steps in one direction."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.full((1,), 0.02, dtype=dtype, requires_grad=True)
        start = weight.item()
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = start - weight.item()
    assert moved[torch.bfloat16] == 0 and moved[torch.float32] == pytest.approx(2e-5, rel=0.01)


def test_disk_is_checked_before_a_run(tmp_path):
    free = preflight.check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(preflight.PreflightError, match=r"output_dir: .* needs .* are free.*save_only_model"):
        preflight.check_disk(tmp_path / "not" / "there", free * 2)


def test_what_a_run_has_already_written_needs_no_room_again(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with open(tmp_path / "checkpoint-1" / "optimizer.pt", "wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    free = preflight.check_disk(tmp_path, 0)
    preflight.check_disk(tmp_path, 2**40 + free // 2)
    with pytest.raises(preflight.PreflightError, match=r"output_dir: .* 1024 "):
        preflight.check_disk(tmp_path, 2**40 + 2 * free)


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ([], 3),  # save_total_limit 2, two saves
        (["--save_total_limit=null"], 3),  # a stop saves too
        (["--save_total_limit=null", "--save_steps=0.3"], 5),  # the last at the end
        (["--save_total_limit=9"], 3),
        (["--save_total_limit=null", "--save_steps=100"], 6),  # 478 steps
        (["--save_total_limit=null", "--save_steps=100", "--max_steps=250"], 4),
        (["--save_total_limit=null", "--save_steps=100", "--max_train_samples=12800"], 2),
        (["--save_total_limit=null", "--save_strategy=epoch", "--num_train_epochs=3"], 4),
        (["--save_total_limit=null", "--save_steps=100", "--dataset_name=some/pairs"], 2),  # of unknown length
        (["--max_steps=10", "--save_steps=10", "--save_total_limit=1"], 2),  # make smoke, which stops its run
        (["--save_strategy=no"], 1),
    ],
)
def test_disk_holds_as_many_checkpoints_as_are_kept(changes, checkpoints):
    recipe = load_recipe(ROOT / "recipes/llama3-8b-base/rmipo.yaml", overrides=changes)
    needed = preflight.disk_needed(recipe, Shape.of(load_config(LLAMA3_8B)), ZERO3)
    # The model in bfloat16; a checkpoint also has the float32 weights and Adam's two moments.
    assert needed == 8_030_261_248 * (2 + checkpoints * (2 + 12))


def test_a_float32_model_takes_twice_the_disk():
    recipe = load_recipe(
        ROOT / "recipes/llama3-8b-base/rmipo.yaml", overrides=["--dtype=float32", "--save_strategy=no"]
    )
    needed = preflight.disk_needed(recipe, Shape.of(load_config(LLAMA3_8B)), ZERO3)
    assert needed == 8_030_261_248 * (4 + 4 + 12)  # and a checkpoint, should the run be stopped


@pytest.mark.parametrize(
    ("setting", "changes", "examples"),
    [
        ("llama3-8b-base/sft", [], 207_865),
        ("llama3-8b-base/rmipo", [], 61_135),
        ("llama3-8b-base/rmipo", ["--max_train_samples=1000"], 1000),
        ("llama3-8b-instruct-hh-helpful/rmipo", [], 43_835),
        ("llama3-8b-instruct-hh-harmless/rmipo", [], 42_537),
        ("llama3-8b-instruct/rmipo", [], None),
    ],
)
def test_examples_of_the_recipes_datasets(setting, changes, examples):
    assert lengths.training_examples(load_recipe(ROOT / f"recipes/{setting}.yaml", overrides=changes)) == examples


def test_examples_that_are_here_are_counted(tmp_path):
    make_twin(tmp_path, "llama3-8b-base/rmipo", "llama3", "ultrafeedback_binarized")
    path, data = ROOT / "recipes/llama3-8b-base/rmipo.yaml", f"--dataset_name={tmp_path / 'data'}"
    assert lengths.training_examples(load_recipe(path, overrides=[data])) == 40
    assert lengths.training_examples(load_recipe(path, overrides=[data, "--max_train_samples=7"])) == 7


def test_offloaded_states_have_to_fit_the_machine(recipe_8b):
    offload, small = Sharding("zero3", offload=True), Hardware(1, 4, 80, 128)
    warning = preflight.check_fit(recipe_8b, small, offload)
    assert "estimated to need 202 GiB of each machine's memory, found 128. Use more machines" in warning
    assert preflight.check_fit(recipe_8b, dataclasses.replace(small, host_gib=256), offload) is None
    assert preflight.check_fit(recipe_8b, small, ZERO3) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2", "zero3-offload", "zero2", "ddp"])
def test_a_training_process_sees_how_it_was_launched(name):
    """Through accelerate itself, on the CPU: `sharding_of` has only what that leaves in the environment."""
    show = (
        "from transformers import TrainingArguments; from rmipo.plan import preflight\n"
        "from rmipo.recipe.load import load_recipe\n"
        "args = TrainingArguments('unused', use_cpu=True)\n"
        "print('seen:', preflight.sharding_of(args))\n"
        "args.use_cpu = False\n"
        "preflight.local_hardware = lambda: preflight.Hardware(1, 1, 4, 9000)\n"
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
        "ddp": r"^said: .*dtype: bfloat16 trains all weights without a float32",
        "zero3-offload": r"^warning: .*needs \d+ GiB per GPU with zero3 on 1 GPUs, found 4 ",
    }.get(name, r"^said: .*: needs \d+ GiB per GPU with \w+ on 1 GPUs, found 4 ")
    assert re.search(said, done.stdout + done.stderr, re.MULTILINE), done


@pytest.mark.parametrize(
    ("head_dim", "capability", "attention", "warned"),
    [
        (256, (8, 0), "auto", True),
        (256, (8, 9), "flex", True),
        (256, (8, 0), "segment", False),
        (256, (9, 0), "auto", False),
        (256, None, "auto", False),  # GPUs that can't be looked at
        (128, (8, 0), "auto", False),
    ],
)
def test_heads_that_flex_is_slow_for_are_warned_of(
    tmp_path, monkeypatch, capsys, head_dim, capability, attention, warned
):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    GemmaConfig(head_dim=head_dim, num_attention_heads=4, num_key_value_heads=1, **sizes).save_pretrained(tmp_path)
    path = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"
    recipe = load_recipe(path, overrides=["--model_name_or_path", str(tmp_path), "--attention", attention])
    preflight.check_launch(recipe, Hardware(1, 4, 80, capability=capability), ZERO3)
    warning = capsys.readouterr().err
    assert ("with heads of 256 dimensions on a GPU of compute capability 8." in warning) == warned == bool(warning)


def test_one_process_that_sees_several_gpus_is_refused(recipe_8b, monkeypatch, tmp_path):
    """transformers would copy the model to all of them in every step."""
    args = TrainingArguments(str(tmp_path))
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 4, 80, 500))
    args._n_gpu = 4
    with pytest.raises(preflight.PreflightError, match=r"sees 4 GPUs.*make train.* CUDA_VISIBLE_DEVICES=0"):
        preflight.check_run(recipe_8b, args)


def test_a_training_process_that_cannot_fit_is_refused(recipe_8b, monkeypatch, tmp_path):
    args, on_cpu = TrainingArguments(str(tmp_path)), TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 2, 24, 500))  # there is no GPU to look at
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(preflight.PreflightError, match="dtype: bfloat16 trains all weights without a float32"):
        preflight.check_run(recipe_8b, args)
    preflight.check_run(recipe_8b, on_cpu)


@pytest.mark.parametrize("recipe", ["tiny/sft", "tiny/rmipo"])
def test_training_scripts_check_before_they_load_anything(recipe, monkeypatch, tmp_path, capsys):
    def refuse(recipe, args):
        assert (recipe.values["max_steps"], args.max_steps) == (2, 2)
        raise preflight.PreflightError("too small")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(frame, "check_run", refuse)
    form = {"tiny/sft": "ultrachat", "tiny/rmipo": "on_policy_ultrafeedback"}[recipe]
    overrides = make_twin(tmp_path, recipe, "llama3", form)
    script = ROOT / "scripts" / ("sft.py" if recipe == "tiny/sft" else "preference.py")
    arguments = ["--config", f"recipes/{recipe}.yaml", *overrides, "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err.endswith("error: too small\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["--memory_check=false", "--optim=adamw_8bit"])
def test_the_estimate_refuses_nothing_where_it_is_switched_off_or_for_another_optimizer(change, monkeypatch):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    small = (Hardware(1, 4, 8), ZERO3)
    path = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"
    with pytest.raises(preflight.PreflightError, match="found 8 "):
        preflight.check_launch(load_recipe(path), *small)
    preflight.check_launch(load_recipe(path, overrides=[change]), *small)


def test_a_recipe_without_an_optimizer_has_transformers_adamw(recipe_8b):
    values = {key: value for key, value in recipe_8b.values.items() if key != "optim"}
    with pytest.raises(preflight.PreflightError, match="found 8 "):
        preflight.check_launch(dataclasses.replace(recipe_8b, values=values), Hardware(1, 4, 8), ZERO3)
