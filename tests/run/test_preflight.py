"""What can't work is found before a model is loaded, all of it at once."""

import gc
import json
import os
import sys
import types

import pytest
import torch
import wandb
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

from rmipo.recipe.load import ConfigError, load_recipe
from rmipo.run import preflight
from rmipo.run.preflight import SFT_METRICS, check_assistant_mask, check_parts, check_special_tokens
from rmipo.training import loading
from tests.helpers.families import LLAMA3_TEMPLATE, make_model, make_tokenizer, save
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.rows import assistant, user
from tests.helpers.twins import make_twin

KNOWN = {"model_name_or_path": "mistralai/Mistral-7B-v0.1"}  # its configuration is built in


def problems(stage="rmipo", overlays=(), **values):
    overrides = [f"--{key}={value}" for key, value in ({"model_name_or_path": "a/b"} | values).items()]
    recipe = load_recipe(ROOT / f"recipes/tiny/{stage}.yaml", [ROOT / name for name in overlays], overrides)
    args, _, model_config = recipe.parse(world_size=1)
    with pytest.raises(ConfigError) as error:
        check_parts(recipe, args, model_config)
    head, *lines = str(error.value).split("\n  ")
    assert head == f"{recipe.path}: this run can't start here:"
    return lines


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim": "adamw_bnb_8bit"}, "optim: adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"use_liger_kernel": "true"}, "use_liger_kernel: True: liger-kernel is not installed"),
        ({"report_to": "[tensorboard, mlflow]"}, "mlflow is not installed: .venv/bin/python -m pip"),
        ({"report_to": "papertrail"}, "report_to: papertrail: papertrail is not supported"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type: warmup_stable_decay: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": '{"cycles": 2}'}, "unexpected keyword argument 'cycles'"),
        ({"lr_scheduler_kwargs": '{"num_cycles": "half"}'}, "could not convert string to float: 'half'"),
        (
            {"use_peft": "true", "lora_target_modules": "[q_projection]", **KNOWN},
            "lora_target_modules: ['q_projection']: Target modules {'q_projection'} not found",
        ),
        (
            {"use_peft": "true", "lora_modules_to_save": "[output]", **KNOWN},
            "lora_modules_to_save: the model has no module output",
        ),
        ({"use_peft": "true", "lora_task_type": "PAIRS", **KNOWN}, "lora_task_type: PAIRS: Invalid task type"),
        (
            {"push_to_hub": "true", "hub_model_id": "me/a"},
            "hub_model_id: me/a: the repository can't be made (Cannot reach",
        ),
        (
            {"push_to_hub": "true", "hub_model_id": "me/a/b"},
            "the repository can't be made (Repo id must be in the form",
        ),
        ({"torch_compile_backend": "fast"}, "torch_compile_backend: fast: 'FAST' is not a valid DynamoBackend"),
        ({"attention": "flex"}, "attention: flex: flex_attention has no backward on the CPU: expected auto, segment"),
        ({"optim_args": "rank"}, "optim: adamw_torch, optim_args: rank: "),
        (
            {"optim_args": '"rank=64, scale=2"'},
            "optim_args: rank=64, scale=2: optim_args rank, optim_args scale: no effect on adamw_torch. Remove it",
        ),
        (
            {"optim": "sgd", "optim_args": '"momentum=0.9,nesterov=false,momentun=0.8"'},
            ": optim_args momentun: no effect on sgd. Remove it",
        ),
        ({"optim_target_modules": "[q_proj]"}, ": optim_target_modules: no effect on adamw_torch. Remove it"),
        ({"load_in_4bit": "true", "use_peft": "true", **KNOWN}, "load_in_4bit: True: Using `bitsandbytes` 4-bit"),
    ],
    ids=str,
)
def test_a_part_that_cannot_be_built_is_named(tmp_path, values, message):
    (line,) = problems(output_dir=tmp_path, **values)
    assert message in line


@pytest.mark.parametrize("tracker", ["mlflow", "dagshub", "neptune"])
def test_a_tracker_that_is_not_installed_leaves_no_complaint_behind(tmp_path, monkeypatch, tracker):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    (line,) = problems(output_dir=tmp_path, report_to=tracker)
    gc.collect()
    assert line.startswith(f"report_to: {tracker}: {tracker} is not installed") and not complaints


BEST = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": "true"}


@pytest.mark.parametrize(
    ("stage", "metric", "known"),
    [
        ("rmipo", "eval_accuracy", "eval_loss, eval_rewards/chosen, "),
        ("rmipo", "common/acc_logratio", "eval_loss, "),  # of methods with a reference
        ("rmipo", "simpo/gamma_mean", "eval_loss, "),
        ("sft", "rewards/accuracies", "eval_loss, eval_entropy, eval_mean_token_accuracy, eval_num_tokens"),
    ],
)
def test_a_metric_that_is_not_logged_is_no_measure_of_the_best_model(tmp_path, stage, metric, known):
    (line,) = problems(stage, output_dir=tmp_path, metric_for_best_model=metric, **BEST, **KNOWN)
    assert line.startswith(f"metric_for_best_model: {metric}: no evaluation logs it: expected one of {known}")


@pytest.mark.parametrize("metric", ["loss", "eval_rmipo/gamma_mean", "common/acc_avg_logp"])
def test_a_metric_that_is_logged_is(tmp_path, metric):
    lines = problems(output_dir=tmp_path, metric_for_best_model=metric, optim="adamw_bnb_8bit", **BEST)
    assert [line.split(":")[0] for line in lines] == ["optim"]


def test_what_trl_logs_of_an_evaluation(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=32)
    rows = Dataset.from_list([{"messages": [user("a"), assistant("yes")]}] * 2)
    trainer = SFTTrainer(
        make_model("llama3"), args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer("llama3")
    )
    logged = {name.removeprefix("eval_") for name in trainer.evaluate() if name.startswith("eval_")}
    speed = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    assert logged - speed == set(SFT_METRICS)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo"])
def test_an_optimizer_that_is_built_on_the_model_needs_its_package(tmp_path, optim):
    (line,) = problems(output_dir=tmp_path, optim=optim, optim_target_modules="[q_proj]", **KNOWN)
    assert line.startswith(f"optim: {optim}, optim_target_modules: ['q_proj']: You need to install")


def test_an_optimizer_that_is_built_on_the_model_finds_its_modules_there(tmp_path, monkeypatch):
    galore = types.SimpleNamespace(GaLoreAdafactor=None, GaLoreAdamW=None, GaLoreAdamW8bit=None)
    monkeypatch.setitem(sys.modules, "galore_torch", galore)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    (line,) = problems(output_dir=tmp_path, optim="galore_adamw", optim_target_modules="[query]", **KNOWN)
    assert line.startswith("optim: galore_adamw, optim_target_modules: ['query']: No target modules found")


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sgd", "momentum=0.9,nesterov=false,dampening=0.0,weight_decay=0.0"),
        ("rmsprop", "momentum=0.0,alpha=0.99,eps=1e-8,weight_decay=0.0,centered=false"),
        ("adagrad", "lr_decay=0.0,weight_decay=0.0"),
    ],
)
def test_options_that_an_optimizer_reads_may_be_its_defaults(tmp_path, optim, optim_args):
    lines = problems(output_dir=tmp_path, optim=optim, optim_args=f'"{optim_args}"', use_liger_kernel="true")
    assert [line.split(":")[0] for line in lines] == ["use_liger_kernel"]


def test_one_module_of_adapters_is_a_name_and_not_a_pattern(tmp_path):
    values = {"use_peft": "true", "lora_modules_to_save": "[embed_tokens]", "optim": "adamw_bnb_8bit", **KNOWN}
    for modules in ("[q_proj]", "q_proj", "all-linear", '[".*q_proj"]'):
        (line,) = problems(output_dir=tmp_path, lora_target_modules=modules, **values)
        assert line.startswith("optim: ")


@pytest.mark.parametrize(
    "modules",
    [
        {"lora_target_modules": "[q_proj, lm_head]"},
        {"lora_target_modules": "[embed_tokens]"},
        {"lora_target_modules": ".*(lm_head|q_proj)"},
        {"lora_target_modules": "all-linear", "lora_modules_to_save": "[lm_head]"},
        {"lora_target_modules": "all-linear", "lora_modules_to_save": "[embed_tokens]"},
    ],
    ids=str,
)
def test_an_adapter_of_tied_embeddings_which_could_not_be_merged_is_refused(tmp_path, modules):
    fine = {"use_peft": "true", "optim": "adamw_bnb_8bit"}
    save("llama-3.2", tmp_path / "tied")
    save("llama3", tmp_path / "untied")
    lines = problems(output_dir=tmp_path, model_name_or_path=tmp_path / "tied", **modules, **fine)
    (refusal,) = [line for line in lines if line.startswith("lora_target_modules: ")]
    assert "lm_head" in refusal or "embed_tokens" in refusal
    (line,) = problems(output_dir=tmp_path, model_name_or_path=tmp_path / "untied", **modules, **fine)
    assert line.startswith("optim: ")


def test_an_attention_whose_package_is_missing(tmp_path):
    (line,) = problems("sft", output_dir=tmp_path, attn_implementation="flash_attention_2", **KNOWN)
    assert line.startswith("attn_implementation: flash_attention_2: FlashAttention2 has been toggled on, but")


@pytest.mark.parametrize("values", [{}, {"torch_compile_backend": "inductor"}, {"attention": "segment"}])
def test_a_kernel_that_every_packed_sequence_would_compile_again(tmp_path, values):
    (line,) = problems(output_dir=tmp_path, torch_compile="true", **values)
    assert line.startswith("torch_compile: True") and line.endswith("Remove it")
    assert "attention: segment would be compiled again for each length of packed sequences" in line


def test_activations_are_offloaded_from_gpus_alone(tmp_path):
    (line,) = problems("sft", output_dir=tmp_path, activation_offloading="true")
    assert line.startswith("activation_offloading: True: it moves activations from a GPU") and line.endswith(
        "Remove it"
    )


def test_all_at_once_with_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    found = problems(
        overlays=["recipes/methods/dpo.yaml"], output_dir=tmp_path / "file",
        reference_cache_dir=tmp_path / "other/of/caches", optim="adamw_bnb_8bit",
    )  # fmt: skip
    assert [line.split(":")[0] for line in found] == ["output_dir", "reference_cache_dir", "optim"]
    for line, name in zip(found, ("file", "other"), strict=False):
        assert line.endswith(f": {tmp_path}/{name} is a file; expected a folder, or the name of a new one")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    (line,) = problems(output_dir=tmp_path / "a/b/c")
    assert line == f"output_dir: {tmp_path}/a/b/c: no permission to write in {tmp_path}"


def test_what_only_some_machines_cannot_do(tmp_path, monkeypatch):
    preflight._check_attention(types.SimpleNamespace(attention="flex", device=torch.device("cuda")))
    monkeypatch.setattr(preflight, "is_liger_kernel_available", lambda: True)
    (line,) = problems(output_dir=tmp_path, use_liger_kernel="true", optim="adamw_bnb_8bit")
    assert line.startswith("optim: ")


def test_modules_are_looked_for_in_the_revision_of_the_model(tmp_path, monkeypatch):
    def load(*model):
        raise ValueError(f"looked for {model}")

    monkeypatch.setattr(preflight, "load_config", load)
    (line,) = problems(output_dir=tmp_path, use_peft="true", model_name_or_path="org/m", model_revision="v2")
    assert line.endswith(": looked for ('org/m', 'v2')")


def test_a_method_without_a_reference_needs_no_cache(tmp_path):
    (tmp_path / "file").touch()
    values = {"output_dir": tmp_path, "reference_cache_dir": tmp_path / "file/cache", "optim": "adamw_bnb_8bit"}
    assert [line.split(":")[0] for line in problems(**values)] == ["optim"]


def test_wandb_without_a_key(tmp_path, monkeypatch):
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "stdin", None)
    (line,) = problems(output_dir=tmp_path, report_to="wandb")
    assert line.startswith("report_to: wandb: W&B has no key. Run `.venv/bin/wandb login`")
    wandb.teardown()


def test_assistant_only_loss_needs_a_template_that_marks_the_assistant():
    recipe = load_recipe(
        ROOT / "recipes/tiny/sft.yaml", overrides=["--assistant_only_loss", "--model_name_or_path=a/b"]
    )
    args, *_ = recipe.parse(world_size=1)
    tokenizer = make_tokenizer("llama3")
    with pytest.raises(ConfigError, match=r"no \{% generation %\} ... \{% endgeneration %\}"):
        check_assistant_mask(args, tokenizer)
    marked = LLAMA3_TEMPLATE.replace("{{ '<|start", "{% generation %}{{ '<|start", 1)
    marked = marked.replace("<|eot_id|>' }}", "<|eot_id|>' }}{% endgeneration %}", 1)
    check_assistant_mask(args, make_tokenizer("llama3", marked))
    check_assistant_mask(args, make_tokenizer("llama3", qwen3_chat_template))  # TRL has one with marks
    args.assistant_only_loss = False
    check_assistant_mask(args, tokenizer)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_longest_dialogue_of_any_split_has_to_fit(tmp_path, monkeypatch, split):
    def load(*arguments, **options):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(loading, "load_model", load)
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    long = {"prompt": "a", "prompt_id": "0", "messages": [user("a"), assistant("yes " * 3000)]}
    with open(tmp_path / f"data/{split}.jsonl", "a") as file:
        file.write(json.dumps(long) + "\n")
    flags = ["--max_length", "null", "--output_dir", str(tmp_path / "out")]
    ended = run_here("sft", "--config", "recipes/tiny/sft.yaml", *overrides, *flags)
    assert ended.code == 2, ended.err
    assert "the length of the longest dialogue (max_length: null) is " in ended.err


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_a_token_that_the_tokenizer_does_not_have(key):
    tokenizer = make_tokenizer("llama3")
    tokenizer.name_or_path = "org/model"
    for token in ("<|eot_id|>", tokenizer.convert_ids_to_tokens(100)):  # special or not
        check_special_tokens(SFTConfig(**{key: token}, use_cpu=True, bf16=False), tokenizer)
    with pytest.raises(ConfigError, match=rf"^{key}: <end>: expected a token of org/model\. Remove the key"):
        check_special_tokens(SFTConfig(**{key: "<end>"}, use_cpu=True, bf16=False), tokenizer)
