"""Every recipe, overlay, sweep and launch configuration that is shipped loads, and holds the paper's values."""

from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rmipo.launch.choices import choose_stages
from rmipo.recipe.files import read_yaml
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.recipes import edited_recipes
from tests.helpers.rows import assistant, user

RECIPES = ROOT / "recipes"
EDITED = edited_recipes()  # a user's own, which may say what they like
LEARNING_RATES = {"llama3-8b-base": 6e-7, "llama3-8b-instruct": 1e-6}
LEARNING_RATES |= {"mistral-7b-base": 3e-7, "mistral-7b-instruct": 5e-7}
PAPER_SETTINGS = [name for name in LEARNING_RATES if not any(path.startswith(f"recipes/{name}/") for path in EDITED)]
STAGES = sorted(
    f"{path.parent.name}/{path.name}"
    for stage in ("sft", "rmipo")
    for path in RECIPES.glob(f"*/{stage}.yaml")
    if path.parent.name != "sweeps" and path.relative_to(ROOT).as_posix() not in EDITED
)
OVERLAYS = sorted(
    str(path.relative_to(RECIPES))
    for folder in ("methods", "ablations", "adapters")
    for path in RECIPES.glob(f"{folder}/*.yaml")
)


@pytest.mark.parametrize("path", STAGES)
def test_recipe_loads_and_divides_over_common_hardware(path):
    recipe = load_recipe(RECIPES / path)
    assert recipe.stage == ("sft" if path.endswith("sft.yaml") else "preference")
    for gpus in (1,) if recipe.values.get("use_cpu") else (1, 2, 4, 8, 16):
        size, accumulation = recipe.batch(gpus)
        assert size == recipe.values["per_device_train_batch_size"] * gpus * accumulation
    assert recipe.values["output_dir"] == f"outputs/{path.removesuffix('.yaml')}"
    assert recipe.values["seed"] == 42
    assert f"make train MODEL={Path(path).parent}" in (RECIPES / path).read_text()


@pytest.mark.parametrize("name", PAPER_SETTINGS)
def test_rmipo_recipes_hold_the_papers_values(name):
    values = load_recipe(RECIPES / name / "rmipo.yaml").values
    objective = {"name": "rmipo", "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6}
    assert objective.items() <= values["objective"].items()
    expected = {
        "learning_rate": LEARNING_RATES[name], "global_batch_size": 128, "num_train_epochs": 1, "max_length": 2048,
        "max_prompt_length": 1800, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "optim": "adamw_torch_fused",
        "bf16": True, "activation_checkpointing": True, "report_to": "wandb",
    }  # fmt: skip
    assert expected.items() <= values.items()


@pytest.mark.parametrize("name", [name for name in PAPER_SETTINGS if name.endswith("base")])
def test_sft_recipes_follow_zephyr(name):
    values = load_recipe(RECIPES / name / "sft.yaml").values
    expected = {
        "dataset_name": "HuggingFaceH4/ultrachat_200k", "dataset_train_split": "train_sft",
        "dataset_test_split": "test_sft", "learning_rate": 2e-5, "global_batch_size": 128, "num_train_epochs": 1,
        "max_length": 2048, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "packing": True,
    }  # fmt: skip
    assert expected.items() <= values.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_fit_every_setting(overlay):
    settings = {path.parent.name for path in RECIPES.glob("*/rmipo.yaml")}
    assert read_yaml(RECIPES / overlay).get("per_setting", {}).keys() <= settings
    for name in {Path(path).parent.name for path in STAGES if path.endswith("rmipo.yaml")}:
        recipe = load_recipe(RECIPES / name / "rmipo.yaml", [RECIPES / overlay])
        recipe.batch(2)
        if overlay.startswith("methods/"):
            assert recipe.values["objective"]["name"] == Path(overlay).stem


@pytest.mark.parametrize(
    ("name", "prompt", "end"),
    [
        ("zephyr", "<s><|system|>\nBe brief.</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n", "</s>"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ],
)
def test_templates_write_one_bos_and_one_end_token(name, prompt, end):
    template = ImmutableSandboxedEnvironment().from_string((RECIPES / f"templates/{name}.jinja").read_text())
    messages = [{"role": "system", "content": "Be brief."}, user("2+2?")]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert template.render(messages=messages, add_generation_prompt=True, **tokens) == prompt
    assert template.render(messages=[*messages, assistant("4")], **tokens) == f"{prompt}4{end}"


def test_the_two_recipes_of_anthropic_hh_differ_in_subset_and_folder_alone():
    setting = "llama3-8b-instruct-hh-{}".format
    recipes = {s: load_recipe(f"recipes/{setting(s)}/rmipo.yaml").values for s in ("helpful", "harmless")}
    differing = {key for key in recipes["helpful"] if recipes["helpful"][key] != recipes["harmless"][key]}
    assert differing == {"datasets", "output_dir"}
    for subset, values in recipes.items():
        (entry,) = values["datasets"]
        assert (entry["path"], entry["data_dir"]) == ("Anthropic/hh-rlhf", f"{subset}-base")
        assert choose_stages({"MODEL": setting(subset)}) == (setting(subset), ["rmipo"])
