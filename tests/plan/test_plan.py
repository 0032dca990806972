"""Estimates of `make plan`: parameter counts, what autograd really keeps, published figures, refusals."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from rmipo.plan import lengths, preflight
from rmipo.plan import memory as plan
from rmipo.plan.memory import GIB, Hardware, Run, Shape, Sharding
from rmipo.plan.shapes import load_config
from rmipo.recipe.load import load_recipe
from rmipo.run import frame
from rmipo.training.batching import HOISTED_MICRO_BATCHES
from rmipo.training.logprobs import label_logps
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.twins import make_twin

ZERO3 = Sharding("zero3")
LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
SMALL = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
)


def make_run(**changes):
    run = Run(
        stage="preference", micro_batch=2, evaluation_batch=2, global_batch=128, max_length=2048, max_tokens=None,
        checkpointing=True, packing=False, weight_bytes=2, autocast=False, prior=True, reference_model=False,
        adapters=False, quantized=False, nested_quantization=False,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


@pytest.fixture
def recipe_8b():
    return load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml")


# Counts that the model cards and checkpoints state.
@pytest.mark.parametrize(
    "name, parameters",
    [
        (LLAMA3_8B, 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
    ],
)
def test_parameters_of_known_models(name, parameters):
    assert Shape.of(load_config(name)).parameters == parameters


def test_adapters_train_r_times_inputs_and_outputs():
    shape = Shape.of(SMALL, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    attention = (64 + 64) + 2 * (64 + 16) + (64 + 64)
    mlp = 3 * (64 + 160)
    assert shape.trained == 4 * 3 * (attention + mlp)
    assert shape.linear == 3 * (64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 160)


def saved_bytes(model, tokens, checkpointing):
    """Bytes that autograd keeps of the decoder layers, each storage counted once, parameters not."""
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    alive = []

    def pack(tensor):
        alive.append(tensor)  # else a freed storage's address could come back
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    if checkpointing:  # the reentrant kind saves its inputs through autograd, where they can be counted
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    hidden = torch.zeros(1, tokens, 64, dtype=model.dtype, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for tensor in rotary:
        kept[tensor.untyped_storage().data_ptr()] = 0  # shared by all layers
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in model.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", [96, 300])
def test_activations_equal_what_autograd_keeps(dtype, checkpointing, tokens):
    model = AutoModelForCausalLM.from_config(SMALL, dtype=dtype, attn_implementation="sdpa")
    shape, size = Shape.of(SMALL), dtype.itemsize
    measured = saved_bytes(model, tokens, checkpointing)
    if checkpointing:
        expected = shape.layers * tokens * shape.hidden * size
    else:
        expected = shape.layers * plan.layer_activations(shape, tokens, size)
    assert measured == pytest.approx(expected, rel=0.03)


def test_head_keeps_one_buffer_of_logits():
    shape, scored = Shape.of(SMALL), 50
    hidden = torch.zeros(scored, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(shape.vocabulary, shape.hidden, dtype=torch.bfloat16)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        label_logps(torch.nn.functional.linear(hidden, weight), torch.zeros(scored, dtype=torch.long))
    wide = [tensor.dtype for tensor in kept.values() if tensor.shape == (scored, shape.vocabulary)]
    assert wide == [torch.bfloat16]
    # The whole vocabulary fits into one chunk here, which is in float32 twice: the shifted logits, and the gradient.
    logits = scored * shape.vocabulary
    assert plan.head_activations(shape, make_run(), scored) == logits * (2 + 8) + scored * shape.hidden * 2
    many = plan.head_activations(Shape.of(load_config(LLAMA3_8B)), make_run(), 8192)
    assert many == 8192 * (128256 + 4096) * 2 + 2 * 2**28


def test_prior_pass_holds_a_few_micro_batches():
    shape, hardware = Shape.of(load_config(LLAMA3_8B)), Hardware(1, 4, 80)
    memory = plan.plan_memory(shape, make_run(), ZERO3, hardware)
    assert memory.prior == plan.no_gradient_pass(shape, make_run(), HOISTED_MICRO_BATCHES * 2 * 2 * 2048)
    whole_step = plan.plan_memory(shape, make_run(global_batch=8), ZERO3, hardware)  # one micro-batch per GPU
    assert whole_step.prior == plan.no_gradient_pass(shape, make_run(), 2 * 2 * 2048) < memory.prior


def test_model_states_follow_deepspeeds_estimator():
    shape = Shape.of(load_config(LLAMA3_8B))
    states = plan.model_states(shape, make_run(), ZERO3, Hardware(1, 4, 80))
    # 18 bytes per parameter over 4 GPUs, and the largest layer (embeddings, 128256 x 4096) gathered in float32.
    assert states["parameters"] + states["gradients and optimizer"] == int(18 * 8_030_261_248 / 4)
    assert states["gathered layer"] == 4 * 128256 * 4096
    offloaded = plan.model_states(shape, make_run(), Sharding("zero3", True, True), Hardware(1, 4, 80))
    assert sum(offloaded.values()) - offloaded["host"] == 4 * 128256 * 4096
    assert offloaded["host"] == int(8_030_261_248 * 18 * 1.5)


def test_longest_row_is_bounded_by_the_recipe():
    assert make_run().longest_row(2) == 2 * 2 * 2048
    assert make_run(max_tokens=6000).longest_row(2) == 6000  # in place of a number of pairs
    assert make_run(max_tokens=1000).longest_row(2) == 2 * 2048  # a pair can't be split
    assert make_run(stage="sft").longest_row(2) == 2 * 2048


def test_quantized_adapters_of_an_8b_model_fit_24_gib():
    shape = Shape.of(load_config(LLAMA3_8B), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    run = make_run(micro_batch=1, evaluation_batch=1, adapters=True, quantized=True, nested_quantization=True)
    states = plan.model_states(shape, run, Sharding("none"), Hardware(1, 1, 24))
    # 0.516 bytes per weight of the linear layers, 2 per embedding, head and norm, 16 per trained weight.
    linear = 6_979_321_856
    expected = linear * 0.5159 + (8_030_261_248 - linear) * 2 + 41_943_040 * 16
    assert sum(states.values()) == pytest.approx(expected, rel=1e-3)
    assert plan.plan_memory(shape, run, Sharding("none"), Hardware(1, 1, 24)).fits


def test_flops_of_a_dense_model_are_six_per_weight_and_token():
    shape = Shape.of(load_config(LLAMA3_8B))
    per_pair = plan.flops_per_example(shape, make_run(prior=False))
    weights_only = 6 * (shape.body * (220 + 640) + 128256 * 4096 * 640)
    assert 1.0 < per_pair / weights_only < 1.05  # attention adds little at these lengths
    prior = plan.flops_per_example(shape, make_run()) - per_pair
    assert prior == pytest.approx(2 * (shape.body + 128256 * 4096) * 640, rel=0.02)


@pytest.mark.parametrize("setting", ["llama3-8b-base", "llama3-8b-instruct", "mistral-7b-base", "mistral-7b-instruct"])
def test_settings_fit_four_80_gib_gpus_and_not_four_of_24(setting):
    recipe = load_recipe(ROOT / f"recipes/{setting}/rmipo.yaml")
    memory = preflight.check_fit(recipe, Hardware(1, 4, 80), ZERO3)
    assert memory.needed == sum(memory.parts.values()) < 80 * GIB
    assert memory.parts["gradients and optimizer"] > 25 * GIB
    with pytest.raises(
        preflight.PreflightError, match=r"needs \d+ GiB per GPU with zero3 on 4 GPUs, found 24 .*more GPUs"
    ):
        preflight.check_fit(recipe, Hardware(1, 4, 24), ZERO3)


@pytest.mark.parametrize(
    "cut",
    [
        ["--max_tokens_per_micro_batch", "131072"],
        ["--per_device_train_batch_size", "32", "--max_tokens_per_micro_batch", "null"],
    ],
)
def test_the_refusal_names_the_keys_that_make_it_fit(cut):
    path, hardware = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", Hardware(1, 4, 80)
    big = [*cut, "--per_device_eval_batch_size", "64"]
    with pytest.raises(preflight.PreflightError) as error:
        preflight.check_fit(load_recipe(path, overrides=big), hardware, ZERO3)
    wanted = str(error.value).split("To fit, set ")[1].split(". ")[0]
    changes = [f"--{change.replace(': ', '=')}" for change in wanted.split(", ")]
    assert [change.split("=")[0] for change in changes] == [cut[0], big[-2]]
    assert preflight.check_fit(load_recipe(path, overrides=[*cut[2:], *changes]), hardware, ZERO3).fits


def test_a_known_models_shape_needs_no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network used"))
    assert load_config(LLAMA3_8B).hidden_size == 4096
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"model_name_or_path: \./nowhere has no readable config.json"):
        load_config("./nowhere")


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
    with pytest.raises(preflight.PreflightError, match=r"needs \d+ GiB, 1024 of them are there and \d+ GiB are free"):
        preflight.check_disk(tmp_path, 2**40 + 2 * free)


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ([], 3),  # save_total_limit 2, four saves
        (["--save_total_limit=null"], 4),
        (["--save_total_limit=null", "--save_steps=0.3"], 4),  # the last at the end
        (["--save_total_limit=9"], 4),
        (["--save_total_limit=null", "--save_steps=100"], 5),  # 478 steps
        (["--save_total_limit=null", "--save_steps=100", "--max_steps=250"], 3),
        (["--save_total_limit=null", "--save_steps=100", "--max_train_samples=12800"], 1),
        (["--save_total_limit=null", "--save_strategy=epoch", "--num_train_epochs=3"], 3),
        (["--save_total_limit=null", "--save_steps=100", "--dataset_name=some/pairs"], 2),  # of unknown length
        (["--save_strategy=no"], 0),
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
    assert preflight.disk_needed(recipe, Shape.of(load_config(LLAMA3_8B)), ZERO3) == 8_030_261_248 * 4


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
    offload, small = Sharding("zero3", True, True), Hardware(1, 4, 80, 128)
    with pytest.raises(
        preflight.PreflightError,
        match=r"offloading with zero3 on 4 GPUs needs 202 GiB of each machine's memory, found 128\. Use more machines",
    ):
        preflight.check_fit(recipe_8b, small, offload)
    assert preflight.check_fit(recipe_8b, dataclasses.replace(small, host_gib=256), offload).host > 200 * GIB
    assert preflight.check_fit(recipe_8b, small, ZERO3).host == 0


@pytest.mark.parametrize("name, kind", [("zero3", "zero3"), ("zero2", "zero2"), ("ddp", "none"), ("fsdp2", "fsdp2")])
def test_launch_configurations_are_read(name, kind):
    assert Sharding.load(ROOT / f"configs/accelerate/{name}.yaml") == Sharding(kind)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero3-offload", "zero2", "ddp")]


@pytest.mark.parametrize("name", ["zero3", "fsdp2", *OTHERS])
def test_a_training_process_sees_how_it_was_launched(name):
    """Through accelerate itself, on the CPU: `sharding_of` has only what that leaves in the environment."""
    show = (
        "from transformers import TrainingArguments\n"
        "from rmipo.plan import preflight\n"
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
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert f"seen: {Sharding.load(ROOT / f'configs/accelerate/{name}.yaml')}\n" in done.stdout, done.stderr[-3000:]
    # As in a training process: under ZeRO-3, models that are made there would be divided over the ranks.
    assert re.search(r"^said: .*: needs \d+ GiB per GPU with \w+ on 1 GPUs, found 4 ", done.stdout, re.MULTILINE), done


def test_a_training_process_that_cannot_fit_is_refused(recipe_8b, monkeypatch, tmp_path):
    args, on_cpu = TrainingArguments(str(tmp_path)), TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(preflight, "local_hardware", lambda: Hardware(1, 2, 24, 500))  # there is no GPU to look at
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(preflight.PreflightError, match=r"needs \d+ GiB per GPU with none on 2 GPUs, found 24 "):
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


def test_offload_is_read_from_the_deepspeed_file():
    assert Sharding.load(ROOT / "configs/accelerate/zero3-offload.yaml") == Sharding("zero3", True, True)


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "-1x80", "8x80; rm -rf /"])
def test_hardware_is_read_strictly(text):
    with pytest.raises(ValueError, match="expected <GPUs per node>x<GiB of one>"):
        Hardware.parse(text)


def make_plan(monkeypatch, capsys, **variables):
    ended = run_here("plan", env={"MODEL": "llama3-8b-instruct", **variables})
    return ended.code, ended.out + ended.err


def test_plan_prints_every_part(monkeypatch, capsys):
    code, text = make_plan(monkeypatch, capsys, GPUS="8x80")
    assert code == 0
    for part in (
        "parameters",
        "gradients and optimizer",
        "activations",
        "head logits",
        "prior pass",
        "Suggested",
        "Disk",
    ):
        assert part in text
    assert "of 80: fits" in text and "8 GPUs in rows of at most 8192 tokens" in text
    suggested = int(text.partition("Suggested max_tokens_per_micro_batch: ")[2].split()[0])
    assert suggested >= 8192 and suggested % 4096 == 0
    # 61135 pairs, 128 at a time; 4.9e13 FLOPs each at 35% of 8 x 312 TFLOP/s.
    assert "Steps: 478" in text and "Hours: 0.9" in text and "An assumption, not a measurement" in text


def test_plan_fails_when_the_run_cannot_fit(monkeypatch, capsys):
    code, text = make_plan(monkeypatch, capsys, GPUS="4x24", METHOD="dpo")
    assert code == 1 and "DOES NOT FIT" in text and "none fits" in text and "prior pass" not in text
    assert "error: GPUS=eight: expected" in make_plan(monkeypatch, capsys, GPUS="eight")[1]
    assert (
        "error: TFLOPS=fast: expected a number above 0" in make_plan(monkeypatch, capsys, GPUS="8x80", TFLOPS="fast")[1]
    )


def test_plan_follows_the_length_that_the_recipe_asks_for(monkeypatch, capsys):
    base = {"MODEL": "llama3-8b-base", "GPUS": "8x80"}
    _, text = make_plan(monkeypatch, capsys, **base, ARGS="--max_steps=100")
    assert "Steps: 100," in text and "Tokens: 11 M" in text  # 100 x 128 pairs of 860 tokens
    _, text = make_plan(monkeypatch, capsys, **base, ARGS="--max_train_samples=1280")
    assert "Examples: 1280, in the training data" in text and "Steps: 10," in text
    _, text = make_plan(monkeypatch, capsys, MODEL="llama3-8b-instruct-hh-helpful", GPUS="8x80")
    assert "Examples: 43835, in the training data" in text and "Steps: 343," in text
    _, text = make_plan(monkeypatch, capsys, GPUS="8x80")
    assert "Examples: 61135, assumed; EXAMPLES= says otherwise" in text
    _, text = make_plan(monkeypatch, capsys, GPUS="8x80", EXAMPLES="1000")
    assert "Examples: 1000, as EXAMPLES says" in text and "Steps: 8," in text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GPUS": "8x80", "SHARDING": "zero9"}, "error: SHARDING='zero9' is not one of them. Files in configs/acc"),
        ({"GPUS": "8x80", "NODES": "1.5"}, "error: NODES='1.5': expected the number of machines"),
        ({"NODES": "2"}, "error: NODES=2: name the GPUs of each and the GiB of one too, e.g. GPUS=8x80"),
    ],
)
def test_plan_refuses_what_it_cannot_plan_for(monkeypatch, capsys, variables, message):
    assert make_plan(monkeypatch, capsys, **variables)[1].startswith(message)


def test_args_of_the_sft_stage_are_no_mistake_in_the_other(monkeypatch, capsys):
    _, text = make_plan(
        monkeypatch, capsys, MODEL="llama3-8b-base", STAGE="sft", GPUS="8x80", ARGS="--packing=false --max_steps=5"
    )
    assert "Steps: 5," in text


def test_plan_says_which_stage_comes_first_and_nothing_else():
    """In a fresh process: warnings of libraries come with their import."""
    environment = os.environ | {"MODEL": "tiny", "DATA": "never-trained.jsonl"}
    for name in ("DS_ACCELERATOR", "STAGE", "METHOD", "ARGS", "GPUS", "NODES", "WANDB_MODE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "scripts/plan.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: model_name_or_path: outputs/tiny/sft-never-trained is made by an earlier stage. Run it first: make train "
        "MODEL=tiny STAGE=sft DATA=never-trained.jsonl\n",
    )


def test_a_checkpoint_holds_weights_masters_and_moments():
    shape, parameters = Shape.of(load_config(LLAMA3_8B)), 8_030_261_248
    sizes = {
        kind: [plan.checkpoint_bytes(shape, make_run(), Sharding(kind), only_model=only) for only in (True, False)]
        for kind in ("zero3", "fsdp2")
    }
    # bfloat16 weights, then 12 bytes per parameter; FSDP2 writes float32 ones (tests/run/test_fsdp2.py trains with it).
    assert sizes == {"zero3": [2 * parameters, 14 * parameters], "fsdp2": [4 * parameters, 16 * parameters]}


@pytest.mark.parametrize("change", ["--memory_check=false", "--optim=adamw_8bit"])
def test_the_estimate_refuses_nothing_where_it_is_switched_off_or_for_another_optimizer(change, monkeypatch):
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    small = (Hardware(1, 4, 8), ZERO3)
    path = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"
    with pytest.raises(preflight.PreflightError, match=r"found 8 .*memory_check: false starts the run without it"):
        preflight.check_launch(load_recipe(path), *small)
    preflight.check_launch(load_recipe(path, overrides=[change]), *small)
