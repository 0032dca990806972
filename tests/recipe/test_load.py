"""Recipes: layers, types, the global batch, every way of getting one wrong; shipped ones hold the paper's values."""

import json
from pathlib import Path

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rmipo.launch.choices import choose_stages
from rmipo.recipe.files import parse_overrides, read_yaml
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.programs import edited_recipes, problems
from tests.helpers.rows import assistant, user

RECIPE = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/pairs",
    "dataset_train_split": "train_prefs",
    "dataset_revision": "abc",
    "output_dir": "outputs/mine/rmipo",
    "objective": {"name": "rmipo", "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6},
    "learning_rate": 1.0e-6,
    "global_batch_size": 128,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
}


@pytest.fixture
def recipe(write):
    return write("rmipo.yaml", RECIPE)


def test_overrides_in_both_spellings_reach_the_dataclasses(recipe):
    overrides = "--learning_rate 2e-5 --objective.beta=2.5 --bf16 --eval_strategy no --max_steps -1"
    args, data_config, model_config = load_recipe(recipe, overrides=overrides.split()).parse(world_size=4)
    assert (args.learning_rate, args.objective["beta"], args.bf16, args.max_steps) == (2e-5, 2.5, True, -1)
    assert args.objective["gamma_max"] == 1.6
    assert args.eval_strategy.value == "no"
    assert (args.global_batch_size, args.gradient_accumulation_steps) == (128, 1)  # the trainer divides it
    assert (data_config.dataset_name, data_config.dataset_train_split) == ("some/pairs", "train_prefs")
    assert data_config.max_dropped_fraction == 0.02
    assert (model_config.model_name_or_path, model_config.model_revision) == ("some/model", "main")
    assert args.run_name == "mine-rmipo"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-1", -1), ("2e-5", 2e-5), (".5", 0.5), ("true", True), ("no", False), ("null", None), ("", None),
        ("{name: rmipo, beta: 2}", {"name": "rmipo", "beta": 2}), ("[a, b]", ["a", "b"]), ('"5"', "5"),
        *((text, text) for text in ("out/exp #2", "*x", "[a", "{{ bos_token }}", "=")),
    ],
)  # fmt: skip
def test_overrides_are_read_as_yaml_and_the_rest_is_text(text, value):
    found = parse_overrides([f"--key={text}"])["key"]
    assert (found, type(found)) == (value, type(value))


def test_overlays_merge_or_replace_the_objective_and_have_values_for_a_setting(write, recipe):
    same = write("same.yaml", {"objective": {"name": "rmipo", "schedule": "linear"}})
    other = write("other.yaml", {"objective": {"name": "dpo"}, "learning_rate": 5e-7})
    assert load_recipe(recipe, [same]).values["objective"] == RECIPE["objective"] | {"schedule": "linear"}
    assert load_recipe(recipe, [other]).values["objective"] == {"name": "dpo"}
    assert load_recipe(recipe, [other], ["--objective.beta", "0.1"]).values["objective"] == {"name": "dpo", "beta": 0.1}
    assert load_recipe(recipe, [], ["--objective.name", "simper"]).values["objective"] == {"name": "simper"}
    assert load_recipe(recipe, [other, same]).values["learning_rate"] == 5e-7
    overlay = {
        "objective": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
        "per_setting": {"mine": {"learning_rate": 3e-7, "objective": {"gamma": 1.6}}, "other": {"learning_rate": 1.0}},
    }
    values = load_recipe(recipe, [write("simpo.yaml", overlay)]).values
    assert values["objective"] == {"name": "simpo", "beta": 2.0, "gamma": 1.6}
    assert values["learning_rate"] == 3e-7 and "per_setting" not in values


def test_base_is_the_file_underneath(write, tmp_path):
    write("rmipo.yaml", RECIPE)
    (tmp_path / "other").mkdir()
    top = tmp_path / "other" / "rmipo.yaml"
    top.write_text("base: ../mine/rmipo.yaml\ndatasets: [{path: a/b}]\nobjective: {gamma_max: 2.0}\n")
    values = load_recipe(top).values
    assert values["objective"] == RECIPE["objective"] | {"gamma_max": 2.0}
    assert (values["datasets"], values["learning_rate"]) == ([{"path": "a/b"}], 1e-6)
    assert values.keys().isdisjoint({"dataset_name", "dataset_train_split", "dataset_revision", "base"})
    write("below.yaml", {"seed": 3, "per_setting": {"other": {"max_length": 1900}}})
    values = load_recipe(top, [write("above.yaml", {"base": "below.yaml", "seed": 4})]).values
    assert (values["seed"], values["max_length"]) == (4, 1900)


def test_another_dataset_or_model_voids_what_described_the_first(recipe, write):
    named = write("named.yaml", RECIPE | {"dataset_test_split": "dev"})
    divided = load_recipe(named, overrides=["--test_split_size=9"])
    assert divided.values["test_split_size"] == 9 and "dataset_test_split" not in divided.values
    values = load_recipe(recipe, overrides=["--dataset_name", "data/mine.jsonl"]).values
    assert values["dataset_name"] == "data/mine.jsonl"
    assert values.keys().isdisjoint({"dataset_train_split", "dataset_revision"})
    values = load_recipe(recipe, overrides=["--datasets", "[{path: a/b}, {path: c/d, weight: 0.5}]"]).values
    assert values["datasets"] == [{"path": "a/b"}, {"path": "c/d", "weight": 0.5}]
    assert "dataset_name" not in values


def test_prefer_local_takes_a_finished_run_and_says_so(write, tmp_path):
    local = tmp_path / "outputs" / "sft"
    recipe = write("rmipo.yaml", RECIPE | {"prefer_local": str(local), "model_revision": "v1"})

    def loaded(*overrides):
        result = load_recipe(recipe, overrides=overrides)
        assert "prefer_local" not in result.values
        # A revision is one of the public model, and no other's.
        assert result.values.get("model_revision") == ("v1" if "some/" in result.values["model_name_or_path"] else None)
        return result.values["model_name_or_path"], " ".join(result.notices)

    local.mkdir(parents=True)
    for finished, expected in ((False, "some/model"), (True, str(local))):
        (local / "run.json").write_text(json.dumps({"finished": finished, "recipe": {}}))
        model, notice = loaded()
        assert model == expected and str(local) in notice
    assert loaded("--model_name_or_path", "x/y")[0] == "x/y"


def test_values_are_read_as_they_are_meant_and_kept_as_they_are_written(write):
    text = yaml.safe_dump({key: value for key, value in RECIPE.items() if key != "learning_rate"})
    path = write("rmipo.yaml", text + "learning_rate: 2e-5\neval_strategy: no\n")
    values = load_recipe(path, overrides=["--max_length=null"]).values
    assert (values["learning_rate"], values["eval_strategy"]) == (2e-5, "no") and "max_length" not in values


@pytest.mark.parametrize(
    "override",
    [
        # No key, a wrong type, another objective's key
        "override", "--learning_rat=1", "--max_length=2.5", "--attention=flash", "--beta=2", "--objective=rmipo",
        "--objective.gamma_beta_ratio=0.5", "--objective.name=grpo", "--chat_template=none.jinja",
        # Missing, contradicting or refused
        "--model_name_or_path=null", "--datasets=[]", "--max_length=1800", "--gradient_accumulation_steps=4",
        "--auto_find_batch_size", "--bf16_full_eval", "--lora_r=8", "--use_dora=true", "--resume_from_checkpoint=x",
        "--hub_token=anything", "--label_smoothing_factor=0.1", "--dataloader_drop_last=true",
        # Out of range
        "--max_dropped_fraction=2", "--global_batch_size=0", "--max_tokens_per_micro_batch=0",
    ],
)  # fmt: skip
def test_each_mistake_is_named(recipe, override):
    key = override.lstrip("-").partition("=")[0]
    assert key in problems(recipe, overrides=[override])


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ("[{path: a}, {path: b, weight: 1.5}]", "datasets: 1: weight"),
        ("[{path: a, wieght: 1}]", "datasets: 0: wieght"),
        ("[{path: a, fraction: 1}, {path: b}]", "fraction"),
    ],
)
def test_mistakes_in_a_mixture_name_the_entry(write, entries, named):
    path = write("rmipo.yaml", {key: value for key, value in RECIPE.items() if not key.startswith("dataset")})
    assert named in problems(path, overrides=[f"--datasets={entries}"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("objective: {name: rmipo, beta: 1, beta: 2}\n", "beta"),
        ("base: gone.yaml\n", "gone.yaml"),
        ("seed: !!python/object/apply:os.system ['true']\n", "broken.yaml"),
    ],
)
def test_broken_files_are_named(write, text, named):
    path = write("broken.yaml", text)
    assert str(path.parent) in problems(path) and named in problems(path)


def test_keys_of_preference_recipes_are_refused_in_sft(write):
    sft = {key: value for key, value in RECIPE.items() if key != "objective"}
    assert load_recipe(write("sft.yaml", sft)).stage == "sft"
    assert "attention" in problems(write("sft.yaml", sft | {"attention": "auto"}))
    assert "bf16_full_eval" in problems(write("sft.yaml", sft), overrides=["--bf16_full_eval"])


def test_the_batch_the_device_and_uploads_follow_from_the_recipe(recipe, monkeypatch):
    for world_size, accumulation in ((4, 16), (64, 1)):
        assert load_recipe(recipe).batch(world_size) == (128, accumulation)
    for gpus in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert load_recipe(recipe, overrides=["--use_cpu", "auto"]).values["use_cpu"] is (gpus == 0)
    args = load_recipe(recipe).parse(world_size=1)[0]
    assert (args.hub_strategy.value, args.hub_private_repo) == ("end", True)
    assert load_recipe(recipe, overrides=["--hub_private_repo=false"]).parse(world_size=1)[0].hub_private_repo is False


def test_liger_replaces_all_but_the_lm_head(recipe):
    overrides = ["--use_liger_kernel=true", "--liger_kernel_config.rope=false"]
    liger = load_recipe(recipe, overrides=overrides).parse(world_size=1)[0].liger_kernel_config
    assert liger["rms_norm"] and not any(
        liger[name] for name in ("rope", "fused_linear_cross_entropy", "cross_entropy")
    )


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
