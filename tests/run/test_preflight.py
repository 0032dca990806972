"""What can't work is found before a model is loaded, all of it at once."""

import sys

import pytest
import wandb

from rmipo.recipe.load import ConfigError, load_recipe
from rmipo.run.preflight import check_assistant_mask, check_parts
from tests.helpers.families import LLAMA3_TEMPLATE, make_tokenizer
from tests.helpers.paths import ROOT


def problems(stage="rmipo", overlays=(), **values):
    overrides = [f"--{key}={value}" for key, value in ({"model_name_or_path": "a/b"} | values).items()]
    recipe = load_recipe(ROOT / f"recipes/tiny/{stage}.yaml", [ROOT / name for name in overlays], overrides)
    args, _, model_config = recipe.parse(world_size=1)
    with pytest.raises(ConfigError) as error:
        check_parts(recipe, args, model_config)
    _, *lines = str(error.value).split("\n  ")
    return lines


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim": "adamw_bnb_8bit"}, "optim: adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"use_liger_kernel": "true"}, "use_liger_kernel: True: liger-kernel is not installed"),
        ({"report_to": "[tensorboard, mlflow]"}, "MLflowCallback requires mlflow to be installed"),
        ({"report_to": "papertrail"}, "report_to: papertrail: papertrail is not supported"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type: warmup_stable_decay: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": '{"cycles": 2}'}, "unexpected keyword argument 'cycles'"),
        ({"load_in_4bit": "true", "use_peft": "true"}, "load_in_4bit: True: Using `bitsandbytes` 4-bit"),
    ],
    ids=str,
)
def test_a_part_that_cannot_be_built_is_named(tmp_path, values, message):
    (line,) = problems(output_dir=tmp_path, **values)
    assert message in line


def test_all_at_once_with_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    found = problems(
        overlays=["recipes/methods/dpo.yaml"], output_dir=tmp_path / "file", reference_cache_dir=tmp_path / "file/cache",
        optim="adamw_bnb_8bit",
    )  # fmt: skip
    assert [line.split(":")[0] for line in found] == ["output_dir", "reference_cache_dir", "optim"]
    assert all(f"{tmp_path}/file is a file; expected a folder" in line for line in found[:2])


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
