"""Recipes of other repositories, as they are published: what they are read as, or why they are refused."""

from pathlib import Path

import pytest

from rmipo.recipe.load import load_recipe
from tests.helpers.programs import problems

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
    assert model_config.dtype == "bfloat16"
    entry = {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft", "test_split": "test_sft", "weight": 1.0}
    assert (data_config.datasets, data_config.dataset_num_proc) == ([entry], 12)
    for named in ("dtype: bfloat16", "max_length: 2048", "eval_strategy: epoch", "overwrite_output_dir"):
        assert any(named in notice for notice in recipe.notices), named


def test_handbook_dpo_recipes_run_unchanged():
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
    recipe = handbook("dpo_mixture")
    args, data_config, _ = recipe.parse(world_size=1)
    assert args.objective == {"name": "dpo", "beta": 0.01}
    entry = {"path": "HuggingFaceH4/ultrafeedback_binarized", "name": "default", "split": "test_prefs"}
    assert data_config.datasets[1] == entry | {"columns": ["chosen", "rejected"], "weight": 0.5}
    assert (data_config.test_split_size, data_config.mixture_seed) == (2000, 0)


# What is published, by kind: the keys that tell it from others, over those that all recipes of its repository have.

COMMON = {
    "model_name_or_path": "some/sft-model", "torch_dtype": None, "dataset_mixer": {"some/pairs": 1.0},
    "dataset_splits": ["train", "test"], "preprocessing_num_workers": 12, "do_eval": True, "evaluation_strategy": "steps",
    "eval_steps": 400, "gradient_accumulation_steps": 16, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "learning_rate": 1.0e-6, "max_length": 2048,
    "max_prompt_length": 1800, "output_dir": "outputs/run", "per_device_train_batch_size": 2, "warmup_ratio": 0.1,
}  # fmt: skip
MIXED = {"id": "some/mix", "config": "Preference", "split": "a_no_think", "columns": ["chosen"], "weight": 0.5}
MIXTURE = {"dataset_mixture": {"datasets": [MIXED], "seed": 0}, "eval_strategy": "no"}
MIXTURE |= dict.fromkeys(("dataset_mixer", "dataset_splits", "evaluation_strategy", "max_prompt_length"))
SFT = {"max_length": None, "max_prompt_length": None, "max_seq_length": 2048, "output_dir": "data/run-sft"}
SIMPO = {"loss_type": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.55, "output_dir": "outputs/llama-3-8b-instruct-simpo"}
ALPHA = {"beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2, "ln": True}
ALPHA |= {"trainer_type": "dpo", "loss_type": "alpha-dpo", "run_name": "llama-3-8b-instruct-alpha-dpo"}
RMIPO = {"beta": 2.0, "gamma_beta_ratio": 0.1, "loss_type": "rmipo", "output_dir": "outputs/mistral-7b-instruct-rmipo"}


def published(write, changes, path="configs/config_full.yaml"):
    values = (COMMON | changes).items()
    return write(path, {key: value for key, value in values if value is not None or key == "torch_dtype"})


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({"loss_type": ["sigmoid"]}, {"name": "dpo", "beta": 0.1}),
        ({"beta": 0.3, "loss_type": "ipo"}, {"name": "ipo", "tau": 0.3}),
        (SIMPO, {"name": "simpo", "beta": 2.5, "gamma": 1.375}),
        (SIMPO | {"loss_type": "simper"}, {"name": "simper"}),
        (ALPHA | {"ln": None},  # its code's default
         {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2, "length_normalization": True}),
        ({"beta": 0.01, "epsilon": 0.02, "loss_type": "epsilon-dpo"}, {"name": "epsilon-dpo", "beta": 0.01, "epsilon": 0.02}),
        (RMIPO, {"name": "rmipo", "beta": 2.0, "fidelity": "release"}),
        (MIXTURE | {"beta": 0.5, "loss_type": "sigmoid"}, {"name": "dpo", "beta": 0.5}),
        ({"objective": {"name": "kto"}, "remove_unused_columns": False}, {"name": "kto"}),
    ],
)  # fmt: skip
def test_published_preference_recipes_are_read(write, changes, objective):
    recipe = load_recipe(published(write, changes))
    assert (recipe.stage, recipe.values["objective"]) == ("preference", objective)
    recipe.batch(world_size=4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (SIMPO | {"loss_type": None}, "beta"),  # ORPO, KTO and others look so too: nothing is guessed
        ({"beta": 0.1, "loss_type": ["sigmoid", "sft"]}, "sft"),
        (SIMPO | {"loss_type": "sigmoid"}, "gamma_beta_ratio"),
        (ALPHA | {"alpha": None}, "alpha"),
        (MIXTURE | {"dataset_mixture": {"datasets": [MIXED | {"wieght": 1}]}, "loss_type": "sigmoid"}, "wieght"),
    ],
)
def test_published_recipes_that_can_not_be_translated_are_refused(write, changes, named):
    assert named in problems(published(write, changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (SFT | {"dataset_splits": ["train"], "dataset_configs": ["tiny"]}, {"max_length": 2048}),  # pretraining goes on
        (SFT | MIXTURE | {"assistant_only_loss": True, "trust_remote_code": True}, {"assistant_only_loss": True}),
    ],
)
def test_published_sft_recipes_are_read(write, changes, expected):
    recipe = load_recipe(published(write, changes | {"hub_strategy": "every_save"}, "sft/config_full.yaml"))
    assert recipe.stage == "sft"
    assert expected.items() <= recipe.values.items()
    assert "hub_strategy" not in recipe.values


def test_what_a_recipe_leaves_out(write):
    recipe = load_recipe(published(write, {"loss_type": "sigmoid", "per_device_train_batch_size": None}))
    assert recipe.batch(2) == (8 * 16 * 2, 16)
    recipe = load_recipe(published(write, {"loss_type": "sigmoid", "max_length": 512, "max_prompt_length": None}))
    assert recipe.values["max_prompt_length"] == 511
    own = {"model_name_or_path": "a/b", "dataset_name": "c/d", "output_dir": "outputs/x/rmipo", "global_batch_size": 8}
    assert load_recipe(write("sft.yaml", own)).notices == []
