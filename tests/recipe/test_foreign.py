"""Recipes of other repositories, as they are published: what they are read as, or why they are refused."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from trl import DPOConfig

from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import PreferenceRunConfig
from tests.helpers.recipes import problems

HANDBOOK = Path(__file__).parent / "foreign"


def handbook(name, *overrides):
    return load_recipe(HANDBOOK / f"{name}.yaml", overrides=["--use_cpu", "true", "--report_to", "none", *overrides])


def test_handbook_sft_recipe_runs_unchanged():
    recipe = handbook("sft_mixer")
    assert recipe.stage == "sft"
    args, data_config, model_config = recipe.parse(world_size=8)
    assert (args.max_length, args.eval_strategy.value, args.activation_checkpointing) == (2048, "epoch", True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (32, 2)
    assert recipe.batch(8) == (512, 2)
    assert (model_config.dtype, model_config.attn_implementation) == ("bfloat16", "flash_attention_2")
    entry = {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft", "test_split": "test_sft", "weight": 1.0}
    assert (data_config.datasets, data_config.dataset_num_proc) == ([entry], 12)
    assert data_config.chat_template.startswith("{% for message in messages %}")
    for notice in (
        "torch_dtype: bfloat16 read as dtype: bfloat16",
        "max_seq_length: 2048 read as max_length: 2048",
        "evaluation_strategy: epoch read as eval_strategy: epoch",
        "use_flash_attention_2: true read as attn_implementation: flash_attention_2",
        "gradient_accumulation_steps: 2 read as global_batch_size: 32 x 2 x number of processes",
        "overwrite_output_dir: true ignored: a finished run is never overwritten",
    ):
        assert notice in recipe.notices


def test_handbook_dpo_recipe_with_a_mixer_runs_unchanged():
    recipe = handbook("dpo_mixer")
    assert recipe.stage == "preference"
    args, data_config, model_config = recipe.parse(world_size=2)
    assert args.objective == {"name": "dpo", "beta": 0.01}
    assert (args.warmup_steps, args.max_length, args.max_prompt_length, args.global_batch_size) == (0.1, 1024, 512, 32)
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert [(entry["path"], entry["weight"]) for entry in data_config.datasets] == [
        ("HuggingFaceH4/ultrafeedback_binarized", 0.5),
        ("Anthropic/hh-rlhf", 1.0),
    ]
    assert (model_config.dtype, model_config.load_in_4bit, model_config.lora_r) == ("float32", True, 16)


def test_handbook_dpo_recipe_with_a_mixture_runs_unchanged():
    recipe = handbook("dpo_mixture")
    args, data_config, _ = recipe.parse(world_size=1)
    assert args.objective == {"name": "dpo", "beta": 0.01}
    assert data_config.datasets[1] == {
        "path": "HuggingFaceH4/ultrafeedback_binarized",
        "name": "default",
        "split": "test_prefs",
        "columns": ["chosen", "rejected"],
        "weight": 0.5,
    }
    assert (data_config.test_split_size, data_config.mixture_seed) == (2000, 0)
    assert "attn_implementation: flash_attention_2 ignored: packed pairs have their own kernels" in str(recipe.notices)


def test_handbook_recipe_can_be_given_a_global_batch():
    recipe = handbook("dpo_mixture", "--global_batch_size", "64", "--objective.beta", "0.05")
    assert recipe.batch(4) == (64, 2)
    assert recipe.values["objective"] == {"name": "dpo", "beta": 0.05}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "apo_zero"}, "loss_type: 'apo_zero' is not supported (supported: sigmoid, ipo, simpo"),
        ({"dtype": "float16"}, "torch_dtype: dtype is set too; keep one of them"),
        ({"dataset_mixture": {"datasets": [{"id": "a/b", "wieght": 1}]}}, "unknown keys wieght: expected id, config"),
        ({"dataset_mixture": [1]}, "dataset_mixture: not in the handbook's form"),
        (
            {"dataset_mixer": {"a/b": 1.0}, "dataset_mixture": None, "dataset_splits": ["test"]},
            "expected one for training",
        ),
    ],
)
def test_handbook_recipe_that_cannot_be_translated(write, change, message):
    values = yaml.safe_load((HANDBOOK / "dpo_mixture.yaml").read_text()) | change
    path = write("dpo.yaml", {key: value for key, value in values.items() if value is not None})
    assert message in problems(path)


def test_ipo_takes_beta_as_tau(write):
    values = yaml.safe_load((HANDBOOK / "dpo_mixture.yaml").read_text()) | {"loss_type": "ipo", "beta": 0.2}
    assert load_recipe(write("ipo.yaml", values)).values["objective"] == {"name": "ipo", "tau": 0.2}


# What is published, by kind: the keys that tell it from others, over those that all recipes of its repository have.

COMMON = {
    "model_name_or_path": "some/sft-model",
    "torch_dtype": None,
    "dataset_mixer": {"some/pairs": 1.0},
    "dataset_splits": ["train", "test"],
    "preprocessing_num_workers": 12,
    "bf16": True,
    "do_eval": True,
    "evaluation_strategy": "steps",
    "eval_steps": 400,
    "gradient_accumulation_steps": 16,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "exps",
    "learning_rate": 1.0e-6,
    "log_level": "info",
    "logging_steps": 5,
    "lr_scheduler_type": "cosine",
    "max_length": 2048,
    "max_prompt_length": 1800,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "output_dir": "outputs/run",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "push_to_hub": False,
    "save_strategy": "steps",
    "save_steps": 1000000,
    "report_to": ["wandb"],
    "save_total_limit": 20,
    "seed": 42,
    "warmup_ratio": 0.1,
}
MIXTURE = {
    "dataset_mixture": {
        "datasets": [
            {"id": "some/mix", "config": "Preference", "split": "a_no_think", "columns": ["chosen"], "weight": 0.5}
        ],
        "seed": 0,
    },
    "dataset_mixer": None,
    "dataset_splits": None,
    "evaluation_strategy": None,
    "eval_strategy": "no",
    "max_prompt_length": None,
}
SFT = {"max_length": None, "max_prompt_length": None, "max_seq_length": 2048, "output_dir": "data/run-sft"}
SIMPO = {"beta": 2.5, "gamma_beta_ratio": 0.55, "output_dir": "outputs/llama-3-8b-instruct-simpo"}
ALPHA = {
    "beta": 2.5,
    "gamma_beta_ratio": 0.6,
    "alpha": 0.2,
    "ln": True,
    "trainer_type": "dpo",
    "loss_type": "alpha-dpo",
    "run_name": "llama-3-8b-instruct-alpha-dpo",
}
RMIPO = {"beta": 2.0, "gamma_beta_ratio": 0.1, "loss_type": "rmipo", "output_dir": "outputs/mistral-7b-instruct-rmipo"}
ORPO = {"beta": 0.05, "save_strategy": "no", "warmup_ratio": None, "warmup_steps": 100}


def published(write, changes, path="configs/config_full.yaml"):
    return write(
        path, {key: value for key, value in (COMMON | changes).items() if value is not None or key == "torch_dtype"}
    )


@pytest.mark.parametrize(
    ("changes", "objective", "notice"),
    [
        ({"beta": 0.01}, {"name": "dpo", "beta": 0.01}, "beta: 0.01 read as objective"),
        ({"beta": 0.01}, {"name": "dpo", "beta": 0.01}, "assumed as there is no loss_type"),
        ({"loss_type": "sigmoid"}, {"name": "dpo", "beta": 0.1}, "loss_type: sigmoid read as"),
        ({}, {"name": "dpo", "beta": 0.1}, "no beta read as objective"),
        ({"beta": 0.05, "loss_type": ["sigmoid"]}, {"name": "dpo", "beta": 0.05}, "loss_type: ['sigmoid'], beta: 0.05"),
        ({"beta": 0.3, "loss_type": "ipo", "output_dir": "data/x-dpo"}, {"name": "ipo", "tau": 0.3}, "loss_type: ipo"),
        ({"beta": 0.01, "output_dir": "data/zephyr-7b-beta-dpo"}, {"name": "dpo", "beta": 0.01}, "read as"),
        (SIMPO, {"name": "simpo", "beta": 2.5, "gamma": 1.375}, "gamma_beta_ratio: 0.55 read as objective"),
        (SIMPO | {"loss_type": "sigmoid"}, {"name": "simpo", "beta": 2.5, "gamma": 1.375}, "loss_type: sigmoid, beta"),
        (
            SIMPO | {"output_dir": "outputs/mistral-7b-base-simper"},
            {"name": "simper"},
            "gamma_beta_ratio: 0.55 ignored: the code of simper doesn't read it",
        ),
        (
            ALPHA,
            {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2, "length_normalization": True},
            "alpha: 0.2, ln: True, trainer_type: dpo read as",
        ),
        (
            ALPHA | {"ln": False},
            {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2, "length_normalization": False},
            "ln: False",
        ),
        (
            {"beta": 0.01, "epsilon": 0.02, "run_name": "epsilon-dpo"},
            {"name": "epsilon-dpo", "beta": 0.01, "epsilon": 0.02},
            "beta: 0.01, epsilon: 0.02 read as",
        ),
        (RMIPO, {"name": "rmipo", "beta": 2.0, "fidelity": "release"}, "gamma_beta_ratio: 0.1 ignored"),
        (MIXTURE | {"beta": 0.5}, {"name": "dpo", "beta": 0.5}, "dataset_mixture"),
        ({"beta": 0.01, "label_smoothing": 0.0}, {"name": "dpo", "beta": 0.01}, "label_smoothing: 0.0 ignored"),
        ({"beta": 0.01, "remove_unused_columns": False}, {"name": "dpo", "beta": 0.01}, "only token ids are kept"),
    ],
)
def test_published_preference_recipes_are_read(write, changes, objective, notice):
    recipe = load_recipe(published(write, changes))
    assert (recipe.stage, recipe.values["objective"]) == ("preference", objective)
    assert notice in "\n".join(recipe.notices)
    recipe.batch(world_size=4)


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        (
            ORPO | {"output_dir": "data/zephyr-orpo-141b-A35b"},
            "x/config.yaml",
            "output_dir (data/zephyr-orpo-141b-A35b) names orpo",
        ),
        (ORPO | {"run_name": "capybara-ORPO"}, "x/config.yaml", "run_name (capybara-ORPO) names orpo"),
        (ORPO | {"hub_model_id": "me/zephyr_orpo"}, "x/config.yaml", "hub_model_id (me/zephyr_orpo) names orpo"),
        (ORPO, "orpo/config_full.yaml", "the path (mine/orpo/config_full.yaml) names orpo"),
        ({"beta": 0.1, "output_dir": "data/gemma-kto"}, "x/config.yaml", "objective: {name: kto, ...}"),
        *(
            ({"beta": 0.1, "run_name": f"gemma-{name}"}, "x/config.yaml", f"run_name (gemma-{name}) names {name}")
            for name in ("rdpo", "r-dpo", "tdpo", "cdpo", "tr-dpo", "online-dpo", "rrhf", "nca", "wpo")
        ),
        ({"beta": 0.1, "output_dir": "data/llama-cpo"}, "x/config.yaml", "objective: {name: cpo, ...}"),
        (SIMPO | {"output_dir": "data/llama-cpo"}, "x/config.yaml", "its keys are those of simpo, but output_dir"),
        (SIMPO | {"output_dir": "data/zephyr-7b-dpo"}, "x/config.yaml", "its keys are those of simpo, but output_dir"),
        ({"beta": 0.1, "loss_type": "kto_pair"}, "dpo/config.yaml", "loss_type: 'kto_pair' is not supported"),
        (MIXTURE | {"beta": 0.05, "loss_type": "apo_zero"}, "dpo/apo.yaml", "loss_type: 'apo_zero' is not supported"),
        (
            {"beta": 0.1, "loss_type": ["sigmoid", "sft"]},
            "x/config.yaml",
            "loss_type: ['sigmoid', 'sft'] is not supported",
        ),
        (SIMPO | {"loss_type": "hinge"}, "x/config.yaml", "loss_type: 'hinge' is not supported"),
        (
            ALPHA | {"alpha": None},
            "x/config.yaml",
            "read as a recipe of alpha-dpo, it needs beta, gamma_beta_ratio, alpha",
        ),
        ({"beta": 0.1, "desirable_weight": 1.0}, "x/config.yaml", "desirable_weight belongs in the objective block"),
        ({"beta": 0.1, "label_smoothing": 0.1}, "x/config.yaml", "label_smoothing belongs in the objective block"),
        ({"beta": 0.1, "sync_ref_model": True}, "x/config.yaml", "sync_ref_model is not a key of recipes"),
        (SIMPO | {"sft_weight": 0.1}, "x/config.yaml", "sft_weight belongs in the objective block"),
    ],
)
def test_published_recipes_of_other_methods_are_refused(write, changes, path, message):
    assert message in problems(published(write, changes, path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (SFT, {"max_length": 2048}),
        (
            SFT | {"dataset_splits": ["train"], "dataset_configs": ["tiny"]},
            {"max_length": 2048},
        ),  # continued pretraining
        (SFT | {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": False}}, {"packing": True}),
        (SFT | {"use_peft": True, "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16}, {"lora_r": 16}),
        (
            SFT
            | MIXTURE
            | {"assistant_only_loss": True, "packing": True, "use_liger_kernel": True, "max_grad_norm": 0.2},
            {"assistant_only_loss": True},
        ),
        (
            SFT | {"neftune_noise_alpha": 5, "hub_strategy": "every_save", "trust_remote_code": True},
            {"neftune_noise_alpha": 5},
        ),
    ],
)
def test_published_sft_recipes_are_read(write, changes, expected):
    recipe = load_recipe(published(write, changes, "sft/config_full.yaml"))
    assert recipe.stage == "sft"
    assert expected.items() <= recipe.values.items()
    assert "hub_strategy" not in recipe.values


def test_what_is_as_it_is_here_anyway_needs_no_notice(write):
    same = {"beta": 0.1, "hub_strategy": "end", "remove_unused_columns": True}
    recipe = load_recipe(published(write, same))
    assert not any("hub_strategy" in notice or "remove_unused_columns" in notice for notice in recipe.notices)
    assert recipe.values.keys().isdisjoint(same)


def test_a_batch_that_a_recipe_leaves_out_is_the_libraries_default(write):
    recipe = load_recipe(published(write, {"beta": 0.1, "per_device_train_batch_size": None}))
    notice = "gradient_accumulation_steps: 16 read as global_batch_size: 8 x 16 x number of processes"
    assert notice in recipe.notices and recipe.batch(2) == (8 * 16 * 2, 16)


def test_a_prompt_may_be_as_long_as_the_recipes_own_max_length_lets_it(write):
    recipe = load_recipe(published(write, {"beta": 0.1, "max_length": 512, "max_prompt_length": None}))
    assert recipe.values["max_prompt_length"] == 511


def test_a_configuration_of_a_dataset_is_kept(write):
    recipe = load_recipe(published(write, SFT | {"dataset_splits": ["train"], "dataset_configs": ["tiny"]}))
    assert recipe.values["datasets"] == [{"path": "some/pairs", "name": "tiny", "split": "train", "weight": 1.0}]


def test_what_a_dpo_recipe_leaves_out_is_as_in_trl(write):
    left_out = (
        "learning_rate",
        "max_length",
        "max_prompt_length",
        "logging_steps",
        "num_train_epochs",
        "gradient_checkpointing",
        "bf16",
    )
    bare = load_recipe(published(write, dict.fromkeys(left_out) | {"beta": 0.1}))
    trl = DPOConfig(output_dir="x", use_cpu=True)
    values = {f.name: f.default for f in fields(PreferenceRunConfig)} | bare.values
    args = SimpleNamespace(**values)
    assert args.learning_rate == trl.learning_rate == 1e-6
    assert args.max_length == trl.max_length == 1024
    assert args.logging_steps == trl.logging_steps == 10
    assert bare.values["activation_checkpointing"] is trl.gradient_checkpointing is True
    assert bare.values["bf16"] is trl.bf16 is True
    assert bare.values["max_prompt_length"] == 1023  # TRL has no limit of its own for prompts
    (notice,) = [line for line in bare.notices if line.startswith("left out, so as in TRL's DPOConfig: ")]
    for part in ("max_length: 1024", "num_train_epochs: 3.0", "activation_checkpointing: true"):
        assert part in notice
    given = load_recipe(published(write, {"beta": 0.1}), overrides=["--learning_rate=3e-7"]).values
    assert (given["learning_rate"], given["max_length"], given["logging_steps"]) == (3e-7, 2048, 5)


def test_an_objective_block_added_to_a_foreign_recipe_leaves_trls_defaults(write):
    left_out = dict.fromkeys(("learning_rate", "num_train_epochs", "gradient_checkpointing"))
    changes = left_out | {"objective": {"name": "kto"}, "label_smoothing": 0.0, "remove_unused_columns": False}
    recipe = load_recipe(published(write, changes))
    assert recipe.values["num_train_epochs"] == DPOConfig.num_train_epochs
    assert recipe.values["activation_checkpointing"] is True and recipe.values["objective"] == {"name": "kto"}
    assert "left out, so as in TRL's DPOConfig: " in "\n".join(recipe.notices)


TRL_DPO = {"model_name_or_path": "a/b", "dataset_name": "c/d", "gradient_accumulation_steps": 8, "output_dir": "x-DPO"}


def test_a_preference_recipe_that_leaves_everything_to_trl_is_no_sft_recipe(write):
    text = problems(write("dpo.yaml", TRL_DPO))
    assert "it has no objective, but output_dir (x-DPO) names dpo" in text and "objective: {name: dpo, ...}" in text
    recipe = load_recipe(write("dpo.yaml", TRL_DPO | {"objective": {"name": "dpo", "beta": 0.1}}))
    assert (recipe.stage, recipe.values["lr_scheduler_type"]) == ("preference", DPOConfig.lr_scheduler_type)
    for name in ("x-sft-for-dpo", "x"):
        assert load_recipe(write("sft.yaml", TRL_DPO | {"output_dir": name})).stage == "sft"


def test_a_recipe_of_this_repository_is_not_translated(write):
    own = {"model_name_or_path": "a/b", "dataset_name": "c/d", "output_dir": "outputs/x/rmipo", "global_batch_size": 8}
    assert load_recipe(write("sft.yaml", own)).notices == []
    text = problems(write("rmipo.yaml", own | {"max_prompt_length": 100}))  # its objective block is forgotten
    assert "objective.name is None: expected one of rmipo" in text
