"""Every shipped recipe trains a tiny random-weight copy for two steps: in one process, and under DeepSpeed ZeRO-3 on two.

The twin has the recipe's architecture class, special tokens and chat template; its data has the columns of the recipe's
dataset. Everything else is the recipe's, through the same scripts as a real run.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.rows import user
from tests.helpers.twins import make_twin, run

# recipe -> family of the twin, and the form of its data
TWINS = {
    "llama3-8b-base/sft": ("llama3", "ultrachat"),
    "llama3-8b-base/rmipo": ("llama3", "ultrafeedback_binarized"),
    "llama3-8b-instruct/rmipo": ("llama3", "on_policy_ultrafeedback"),
    "mistral-7b-base/sft": ("zephyr", "ultrachat"),
    "mistral-7b-base/rmipo": ("zephyr", "ultrafeedback_binarized"),
    "mistral-7b-instruct/rmipo": ("mistral-instruct", "on_policy_ultrafeedback"),
}


def check_that_sharding_changes_nothing(recipe, overrides, folder, sharding):
    alone = run(recipe, overrides, folder / "alone")
    sharded = run(recipe, overrides, folder / "sharded", sharding=sharding)
    assert [line["step"] for line in alone] == [1, 2]
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in alone], abs=2e-6)
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
    weights, sharded_weights = (load_file(folder / name / "model.safetensors") for name in ("alone", "sharded"))
    assert weights.keys() == sharded_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(sharded_weights[name], value, atol=2e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TWINS)
def test_recipe_trains_its_twin_in_one_process_and_under_zero3(tmp_path, recipe):
    family, form = TWINS[recipe]
    check_that_sharding_changes_nothing(recipe, make_twin(tmp_path, recipe, family, form), tmp_path, "zero3")
    record = json.loads((tmp_path / "sharded" / "run.json").read_text())
    assert record["finished"] and record["world_size"] == 2 and record["recipe"]["global_batch_size"] == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sharded")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template([user("what is right")], **options)
    generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert prompt["input_ids"].shape[1] < generated.shape[1] <= prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family, end", [("qwen3", "<|im_end|>"), ("gemma-3", "<end_of_turn>")])
def test_another_model_trains_by_changing_its_name(tmp_path, family, end):
    """The Llama-3 recipe with another `model_name_or_path`: trained, exported and loaded without another change."""
    overrides = make_twin(tmp_path, "llama3-8b-instruct/rmipo", family, "on_policy_ultrafeedback")
    lines = run("llama3-8b-instruct/rmipo", overrides, tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] and record["results"]["parity"] < 1e-5
    trained, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The turn's end isn't Gemma's end of a text, where its tokenizer alone would have generation stop.
    tokenizer, ends = AutoTokenizer.from_pretrained(tmp_path / "out"), trained.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(end) in (ends if isinstance(ends, list) else [ends])
    initial = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert all(not torch.equal(value, initial[name]) for name, value in trained.named_parameters())


def test_a_model_of_sft_ends_its_turns_where_its_template_does(tmp_path):
    run("tiny/sft", make_twin(tmp_path, "tiny/sft", "gemma-3", "ultrachat"), tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name).eos_token for name in ("model", "out"))
    assert (before, after) == ("<eos>", "<end_of_turn>")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero2", "zero3-offload"])
def test_the_other_deepspeed_files_train_alike(tmp_path, sharding):
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    check_that_sharding_changes_nothing("tiny/rmipo", overrides, tmp_path, sharding)
