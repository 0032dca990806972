"""Estimates of `make plan`: parameter counts, what autograd really keeps, published figures, refusals."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from rmipo import plan, preflight
from rmipo.batching import HOISTED_MICRO_BATCHES
from rmipo.config import load_recipe
from rmipo.logps import label_logps
from rmipo.plan import GIB, Hardware, Run, Shape, Sharding
from rmipo.shapes import load_config

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("name, kind", [("zero3", "zero3"), ("zero2", "zero2"), ("ddp", "none"), ("fsdp2", "fsdp2")])
def test_launch_configurations_are_read(name, kind):
    assert Sharding.load(ROOT / f"configs/accelerate/{name}.yaml") == Sharding(kind)


def test_offload_is_read_from_the_deepspeed_file():
    assert Sharding.load(ROOT / "configs/accelerate/zero3-offload.yaml") == Sharding("zero3", True, True)


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "-1x80", "8x80; rm -rf /"])
def test_hardware_is_read_strictly(text):
    with pytest.raises(ValueError, match="expected <GPUs per node>x<GiB of one>"):
        Hardware.parse(text)


def make_plan(monkeypatch, capsys, **variables):
    for name, value in {"MODEL": "llama3-8b-instruct", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/plan.py"), run_name="__main__")
    return end.value.code, capsys.readouterr().out


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
    assert make_plan(monkeypatch, capsys, GPUS="eight")[0].startswith("error: GPUS=eight: expected")
    assert (
        make_plan(monkeypatch, capsys, GPUS="8x80", TFLOPS="fast")[0] == "error: TFLOPS=fast: expected a number above 0"
    )
