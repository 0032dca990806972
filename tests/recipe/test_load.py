"""Recipes: layers, types, the handbook's keys, the global batch; and every way of getting one wrong."""

import json
from pathlib import Path

import pytest
import yaml

from rmipo.recipe.load import ConfigError, load_recipe

HANDBOOK = Path(__file__).parent / "handbook"
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
def write(tmp_path):
    """write(name, mapping or text) -> path in the folder of the setting `mine`."""

    def write(name, content):
        path = tmp_path / "mine" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture
def recipe(write):
    return write("rmipo.yaml", RECIPE)


def problems(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)


# Layers


def test_overrides_in_both_spellings_reach_the_dataclasses(recipe):
    overrides = [
        "--learning_rate",
        "2e-5",
        "--objective.beta=2.5",
        "--bf16",
        "--eval_strategy",
        "no",
        "--max_steps",
        "-1",
    ]
    args, data_config, model_config = load_recipe(recipe, overrides=overrides).parse(world_size=4)
    assert (args.learning_rate, args.objective["beta"], args.bf16, args.max_steps) == (2e-5, 2.5, True, -1)
    assert args.objective["gamma_max"] == 1.6
    assert args.eval_strategy.value == "no"
    assert args.gradient_accumulation_steps == 16
    assert (data_config.dataset_name, data_config.dataset_train_split, data_config.max_dropped_fraction) == (
        "some/pairs",
        "train_prefs",
        0.02,
    )
    assert (model_config.model_name_or_path, model_config.model_revision) == ("some/model", "main")
    assert args.run_name == "mine-rmipo"


def test_overlay_merges_or_replaces_the_objective_by_its_name(write, recipe):
    same = write("same.yaml", {"objective": {"name": "rmipo", "schedule": "linear"}})
    other = write("other.yaml", {"objective": {"name": "dpo"}, "learning_rate": 5e-7})
    assert load_recipe(recipe, [same]).values["objective"] == RECIPE["objective"] | {"schedule": "linear"}
    assert load_recipe(recipe, [other]).values["objective"] == {"name": "dpo"}
    assert load_recipe(recipe, [other], ["--objective.beta", "0.1"]).values["objective"] == {"name": "dpo", "beta": 0.1}
    assert load_recipe(recipe, [], ["--objective.name", "simper"]).values["objective"] == {"name": "simper"}
    assert load_recipe(recipe, [other, same]).values["learning_rate"] == 5e-7


def test_overlay_has_values_of_its_own_for_a_setting(write, recipe):
    overlay = {
        "objective": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
        "per_setting": {"mine": {"learning_rate": 3e-7, "objective": {"gamma": 1.6}}, "other": {"learning_rate": 1.0}},
    }
    values = load_recipe(recipe, [write("simpo.yaml", overlay)]).values
    assert values["objective"] == {"name": "simpo", "beta": 2.0, "gamma": 1.6}
    assert values["learning_rate"] == 3e-7
    assert "per_setting" not in values


def test_another_dataset_or_model_voids_what_described_the_first(recipe):
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
        return result.values["model_name_or_path"], " ".join(result.notices)

    assert loaded() == ("some/model", f"model_name_or_path: some/model, because {local} holds no finished run")
    local.mkdir(parents=True)
    (local / "run.json").write_text(json.dumps({"finished": False, "recipe": {}}))
    assert loaded()[0] == "some/model"
    (local / "run.json").write_text(json.dumps({"finished": True, "recipe": {}}))
    model, notice = loaded()
    assert model == str(local) and "in place of some/model" in notice
    assert loaded("--model_name_or_path", "x/y")[0] == "x/y"


# Values


def test_numbers_without_a_dot_and_dates_are_read_as_meant(write):
    text = yaml.safe_dump(RECIPE | {"learning_rate": 0}).replace("learning_rate: 0", "learning_rate: 2e-5")
    values = load_recipe(write("r.yaml", text + "run_name: 2024-05-01\neval_strategy: no\n")).values
    assert (values["learning_rate"], values["run_name"], values["eval_strategy"]) == (2e-5, "2024-05-01", "no")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--learning_rat=1", "learning_rat is not a key of recipes; did you mean learning_rate?"),
        ("--learning_rate=fast", "command line: learning_rate is 'fast': expected a number"),
        ("--learning_rate=.nan", "learning_rate is nan: expected a number"),
        ("--learning_rate=-1", "learning_rate is -1: expected at least 0"),
        ("--max_length=2.5", "max_length is 2.5: expected a whole number"),
        ("--max_length=true", "max_length is True: expected a whole number"),
        ("--bf16=maybe", "bf16 is 'maybe': expected true or false"),
        ("--lr_scheduler_type=cos", "expected one of linear, cosine"),
        ("--attention=flash", "attention is 'flash': expected one of auto, segment, dense, flex"),
        ("--dtype=fp8", "dtype is 'fp8': expected one of auto, bfloat16, float16, float32"),
        ("--datasets=all", "datasets is 'all': expected a list"),
        ("--model_name_or_path=null", "model_name_or_path is missing"),
        ("--datasets=[]", "expected either dataset_name or datasets"),
        ("--max_dropped_fraction=2", "max_dropped_fraction is 2: expected 0 to 1"),
        ("--max_length=512", "max_prompt_length is 1800: expected less than max_length (512)"),
        ("--global_batch_size=0", "global_batch_size is 0: expected at least 1"),
        ("--gradient_accumulation_steps=4", "gradient_accumulation_steps follows from global_batch_size: remove it"),
        ("--load_in_4bit", "need use_peft: true"),
        ("--packing", "packing is a key of sft recipes, and this is one of stage preference"),
        ("--attn_implementation=sdpa", "attn_implementation can't be set: packed pairs have their own kernels"),
        ("--auto_find_batch_size", "it would change the batch size behind global_batch_size"),
        ("--gamma_beta_ratio=0.5", "gamma_beta_ratio belongs into the objective block (objective.gamma_beta_ratio)"),
        ("--beta=2", "beta belongs into the objective block (objective.beta)"),
        ("--objective.gamma_beta_ratio=0.5", "objective.gamma_beta_ratio is not a key of rmipo"),
        ("--objective.gamma_max=0.1", "objective.gamma_m"),
        ("--objective.name=grpo", "objective.name is 'grpo': expected one of rmipo, dpo"),
        ("--objective=rmipo", "objective is 'rmipo': expected a block"),
        ("--chat_template=zephyr", "expected template text or the path of a .jinja file"),
        ("--chat_template=none.jinja", "chat_template is 'none.jinja': no such file"),
        ("--hub_token=anything", "log in with `hf auth login` or set HF_TOKEN"),
        ("learning_rate=1", "'learning_rate=1' is no override: expected --key value or --key=value"),
    ],
)
def test_each_mistake_is_named(recipe, override, message):
    assert message in problems(recipe, overrides=[override])


def test_all_mistakes_are_reported_at_once_with_their_file(write, recipe):
    overlay = write("overlay.yaml", {"max_lenght": 10, "per_device_train_batch_size": "two"})
    text = problems(recipe, [overlay], ["--objective.gamma", "1", "--seed", "x", "--max_length", "100"])
    assert text.startswith(f"{recipe}: 5 problems\n")
    for line in (
        f"{overlay}: max_lenght is not a key of recipes; did you mean max_length?",
        f"{overlay}: per_device_train_batch_size is 'two': expected a whole number",
        "command line: seed is 'x': expected a whole number",
        "max_prompt_length is 1800: expected less than max_length (100)",
        "objective.gamma is not a key of rmipo",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "seed is set twice, in line 1 and in line 3"),
        ("objective: {name: rmipo, beta: 1, beta: 2}\n", "beta is set twice"),
        ("- a\n- b\n", "holds list: expected `key: value` lines"),
        ("", "holds NoneType"),
        ("a: [1\n", "is not a valid recipe"),
        ("seed: !!python/object/apply:os.system ['true']\n", "is not a valid recipe"),
    ],
)
def test_broken_files_are_named(write, text, message):
    path = write("broken.yaml", text)
    assert f"{path}: 1 problem\n  {path}: " in problems(path) and message in problems(path)


def test_missing_file_is_named(tmp_path):
    assert "none.yaml: cannot be read: No such file" in problems(tmp_path / "none.yaml")


def test_tokens_are_refused_and_not_repeated(write, recipe):
    secret = "hf_" + "a1B2" * 8
    for override in (f"--hub_token={secret}", f"--run_name={secret}", f"--lr_scheduler_kwargs={{token: {secret}}}"):
        text = problems(recipe, overrides=[override])
        assert secret not in text and ("token" in text)


def test_keys_of_preference_recipes_are_refused_in_sft(write):
    sft = {key: value for key, value in RECIPE.items() if key != "objective"}
    assert load_recipe(write("sft.yaml", sft)).stage == "sft"
    text = problems(write("sft.yaml", sft | {"attention": "auto"}))  # read as a preference recipe without an objective
    assert "objective.name is None: expected one of rmipo" in text


# The global batch


@pytest.mark.parametrize(
    ("per_device", "world_size", "accumulation"), [(2, 4, 16), (1, 1, 128), (8, 16, 1), (4, 32, 1), (2, 1, 64)]
)
def test_accumulation_follows_from_the_global_batch(recipe, per_device, world_size, accumulation):
    loaded = load_recipe(recipe, overrides=["--per_device_train_batch_size", str(per_device)])
    assert loaded.batch(world_size) == (128, accumulation)
    assert per_device * world_size * accumulation == 128


def test_indivisible_global_batch_lists_what_would_work(recipe):
    loaded = load_recipe(recipe, overrides=["--global_batch_size", "24", "--per_device_train_batch_size", "4"])
    with pytest.raises(ConfigError) as error:
        loaded.parse(world_size=4)
    assert "global_batch_size 24 is not a multiple of per_device_train_batch_size (4) x processes (4)" in str(
        error.value
    )
    assert "With 4 processes, per_device_train_batch_size can be: 1, 2, 3, 6\n" in str(error.value)
    assert "With 4 per device, the number of processes can be: 1, 2, 3, 6" in str(error.value)


def test_world_size_is_the_launchers(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size \(2\) x processes \(3\)"):
        load_recipe(recipe).parse()


def test_gpu_recipe_on_a_cpu_is_refused_before_anything_is_loaded(recipe):
    loaded = load_recipe(recipe, overrides=["--use_cpu", "false"])
    with pytest.raises(ConfigError, match=r"trains on GPUs, and none is visible. MODEL=tiny .* `use_cpu: true`"):
        loaded.require_device(0)
    loaded.require_device(1)
    load_recipe(recipe).require_device(0)


@pytest.mark.parametrize(("gpus", "use_cpu"), [(0, True), (1, False)])
def test_device_auto_is_a_gpu_where_there_is_one(recipe, monkeypatch, gpus, use_cpu):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    loaded = load_recipe(recipe, overrides=["--use_cpu", "auto"])
    assert loaded.values["use_cpu"] is use_cpu
    loaded.require_device(gpus)


def test_model_folder_that_is_not_there_is_named(recipe):
    loaded = load_recipe(recipe, overrides=["--model_name_or_path", "outputs/mine/sft"])
    with pytest.raises(ConfigError, match="model_name_or_path is outputs/mine/sft: no such folder"):
        loaded.parse(1)


def test_chat_template_comes_back_as_text(write, recipe):
    template = write("t.jinja", "{{ bos_token }}")
    _, data_config, _ = load_recipe(recipe, overrides=["--chat_template", str(template)]).parse(1)
    assert data_config.chat_template == "{{ bos_token }}"


# Recipes of the alignment-handbook


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
        ({"loss_type": "apo_zero"}, "loss_type: 'apo_zero' has no translation (sigmoid, ipo have)"),
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
