"""Every shipped recipe trains a shrunken twin for two optimizer steps: in one process, and under DeepSpeed ZeRO-3 on two.

The twin has the recipe's architecture class, special tokens and chat template; its data has the columns of the recipe's
dataset. Everything else is the recipe's, through the same scripts as a real run.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.recipe.load import load_recipe
from rmipo.record import read_metrics
from tests.helpers.families import save

REPOSITORY = Path(__file__).parents[2]
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "margin",
    "reward",
    "token",
    "what",
    "why",
    "how",
    "is",
    "the",
    "of",
    "a",
    "right",
    "wrong",
    "answer",
]
# recipe -> family of the twin, and the form of its data
TWINS = {
    "llama3-8b-base/sft": ("llama3", "ultrachat"),
    "llama3-8b-base/rmipo": ("llama3", "ultrafeedback_binarized"),
    "llama3-8b-instruct/rmipo": ("llama3", "on_policy_ultrafeedback"),
    "llama3-70b-instruct/rmipo": ("llama3", "ultrafeedback_binarized"),
    "mistral-7b-base/sft": ("zephyr", "ultrachat"),
    "mistral-7b-base/rmipo": ("zephyr", "ultrafeedback_binarized"),
    "mistral-7b-instruct/rmipo": ("mistral-instruct", "on_policy_ultrafeedback"),
    "tiny/sft": ("llama3", "ultrachat"),
    "tiny/rmipo": ("llama3", "on_policy_ultrafeedback"),
}


def dialogue(random_state, prompt):
    answer = " ".join(random_state.choices(WORDS, k=random_state.randint(1, 12)))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def row(form, random_state, number):
    prompt = " ".join(random_state.choices(WORDS, k=random_state.randint(1, 8)))
    first, second = (dialogue(random_state, prompt) for _ in range(2))
    if form == "ultrachat":
        return {"prompt": prompt, "prompt_id": str(number), "messages": first + second}
    pair = {"prompt": prompt, "prompt_id": str(number), "chosen": first, "rejected": second}
    if form == "ultrafeedback_binarized":
        return pair | {"messages": first, "score_chosen": 8.0, "score_rejected": 5.5}
    return pair | {"all_generated_responses": [first[1]["content"]], "all_rm_scores": [0.5]}


def make_twin(folder, recipe, family, form):
    """Write model, tokenizer and data; returns the command-line overrides that point the recipe at them."""
    save(family, folder / "model")
    values = load_recipe(REPOSITORY / "recipes" / f"{recipe}.yaml").values
    random_state = random.Random(0)
    for split, count in (("train", 40), ("test", 3)):
        name = values.get(f"dataset_{split}_split", split)
        (folder / "data").mkdir(exist_ok=True)
        with open(folder / "data" / f"{name}.jsonl", "w") as file:
            for number in range(count):
                file.write(json.dumps(row(form, random_state, number)) + "\n")
    overrides = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "dataset_num_proc": 1,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "max_steps": 2,
        "global_batch_size": 16,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        # The first step of a warm-up has learning rate 0; here every step moves the weights.
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    if recipe.endswith("/rmipo"):
        overrides |= {"generation_samples": 1, "generation_max_new_tokens": 2}
    elif values.get("packing"):
        overrides |= {"max_length": 64}  # so that the packed rows fill two global batches
    return [text for key, value in overrides.items() for text in (f"--{key}", str(value))]


def run(recipe, overrides, output_dir, zero3, deepspeed="zero3-cpu"):
    script = "sft" if recipe.endswith("sft") else "preference"
    launcher = [sys.executable]
    extra = []
    if zero3:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        extra = ["--deepspeed", f"configs/deepspeed/{deepspeed}.json"]
    command = [*launcher, f"scripts/{script}.py", "--config", f"recipes/{recipe}.yaml", *overrides, *extra]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(output_dir)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [line for line in read_metrics(output_dir) if "loss" in line]


@pytest.mark.parametrize("recipe", TWINS)
def test_recipe_trains_its_twin_in_one_process_and_under_zero3(tmp_path, recipe):
    family, form = TWINS[recipe]
    overrides = make_twin(tmp_path, recipe, family, form)
    alone = run(recipe, overrides, tmp_path / "alone", zero3=False)
    sharded = run(recipe, overrides, tmp_path / "sharded", zero3=True)

    assert [line["step"] for line in alone] == [1, 2]
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in alone], abs=2e-6)
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
    record = json.loads((tmp_path / "sharded" / "run.json").read_text())
    assert record["finished"] and record["world_size"] == 2 and record["recipe"]["global_batch_size"] == 16

    weights, sharded_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "sharded"))
    assert weights.keys() == sharded_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(sharded_weights[name], value, atol=2e-4, rtol=0, msg=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sharded")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is right"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert prompt["input_ids"].shape[1] < generated.shape[1] <= prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", ["qwen3", "gemma-3", "llama-3.2"])
def test_another_model_trains_by_changing_its_name(tmp_path, family):
    """The Llama-3 recipe with another `model_name_or_path`: trained, exported and loaded without another change."""
    overrides = make_twin(tmp_path, "llama3-8b-instruct/rmipo", family, "on_policy_ultrafeedback")
    lines = run("llama3-8b-instruct/rmipo", overrides, tmp_path / "out", zero3=False)
    assert [line["step"] for line in lines] == [1, 2]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] and record["results"]["parity"] < 1e-5
    trained, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    initial = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert all(not torch.equal(value, initial[name]) for name, value in trained.named_parameters())


@pytest.mark.parametrize("deepspeed", ["zero2", pytest.param("zero3-offload", marks=pytest.mark.slow)])
def test_the_other_deepspeed_files_train_alike(tmp_path, deepspeed):
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    alone = run("tiny/rmipo", overrides, tmp_path / "alone", zero3=False)
    sharded = run("tiny/rmipo", overrides, tmp_path / "sharded", zero3=True, deepspeed=deepspeed)
    assert [line["step"] for line in sharded] == [1, 2]
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in alone], abs=2e-6)
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-4)
    weights, sharded_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "sharded"))
    assert weights.keys() == sharded_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(sharded_weights[name], value, atol=2e-4, rtol=0, msg=name)
