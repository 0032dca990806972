"""Recipes: layers, types, the global batch; and every way of getting one wrong."""

import json

import pytest
import yaml
from transformers.trainer_utils import IntervalStrategy

from rmipo.errors import ConfigError
from rmipo.recipe.files import coerce, parse_overrides
from rmipo.recipe.load import load_recipe, template_text
from tests.helpers.recipes import problems

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


NO_YAML = ("out/exp #2", "a: b", "*x", "[a] # b", "[a", '"a" # b', "{{ bos_token }}", "=", "2026-11-29", "010", "1:30")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-1", -1), ("2e-5", 2e-5), (".5", 0.5), ("true", True), ("no", False), ("null", None), ("", None),
        ("{name: rmipo, beta: 2}", {"name": "rmipo", "beta": 2}), ("[a, 'b #2']", ["a", "b #2"]), ('"5"', "5"),
        *((text, text) for text in NO_YAML),
    ],
)  # fmt: skip
def test_numbers_and_blocks_of_the_command_line_are_read_and_the_rest_is_text(text, value):
    found = parse_overrides([f"--key={text}"])["key"]
    assert (found, type(found)) == (value, type(value))


def test_overlays_merge_or_replace_the_objective_and_have_values_for_a_setting(write, recipe, tmp_path):
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
    assert values["learning_rate"] == 3e-7
    assert "per_setting" not in values
    write("../base/rmipo.yaml", RECIPE)
    write("rmipo.yaml", {"base": "../base/rmipo.yaml", "output_dir": "out"})
    overlay = write("dpo.yaml", {"seed": 1, "per_setting": {"base": {"learning_rate": 3e-5}}})
    mine, base = (load_recipe(tmp_path / name / "rmipo.yaml", [overlay]) for name in ("mine", "base"))
    assert base.values["learning_rate"] == 3e-5 != mine.values["learning_rate"]
    assert not base.notices and any("learning_rate" in notice for notice in mine.notices)


def test_base_is_the_file_underneath_and_tilde_the_home_folder(write, tmp_path, monkeypatch):
    write("rmipo.yaml", RECIPE)
    (tmp_path / "other").mkdir()
    top = tmp_path / "other" / "rmipo.yaml"
    top.write_text("base: ../mine/rmipo.yaml\ndatasets: [{path: a/b}]\nobjective: {gamma_max: 2.0}\n")
    values = load_recipe(top).values
    assert values["objective"] == RECIPE["objective"] | {"gamma_max": 2.0}
    assert (values["datasets"], values["learning_rate"]) == ([{"path": "a/b"}], 1e-6)
    assert values.keys().isdisjoint({"dataset_name", "dataset_train_split", "dataset_revision", "base"})
    write("below.yaml", {"seed": 3, "per_setting": {"other": {"max_length": 1900}}})
    above = write("above.yaml", {"base": "below.yaml", "seed": 4})
    values = load_recipe(top, [above]).values
    assert (values["seed"], values["max_length"]) == (4, 1900)
    monkeypatch.setenv("HOME", "/users/me")
    changes = {"model_name_or_path": "~/models/m", "datasets": [{"path": "~/pairs"}]}
    recipe = write("rmipo.yaml", {key: value for key, value in RECIPE.items() if "dataset" not in key} | changes)
    values = load_recipe(recipe, [write("o.yaml", {"chat_template": "~/t.jinja {{"})], ["--output_dir=~/out"]).values
    assert values["model_name_or_path"] == "/users/me/models/m"
    assert values["datasets"] == [{"path": "/users/me/pairs"}]
    assert (values["output_dir"], values["chat_template"]) == ("/users/me/out", "/users/me/t.jinja {{")
    assert load_recipe(recipe, overrides=["--run_name=~root"]).values["run_name"] == "~root"


def test_a_revision_of_a_folder_and_tokens_are_refused(write, tmp_path):
    own = RECIPE | {"model_name_or_path": str(tmp_path), "model_revision": "v2"}
    assert "model_revision" in problems(write("rmipo.yaml", own))
    secret = "hf_" + "a1B2" * 8
    for override in (f"--hub_token={secret}", f"--run_name={secret}", f"--lr_scheduler_kwargs={{token: {secret}}}"):
        text = problems(write("rmipo.yaml", RECIPE), overrides=[override])
        assert secret not in text and "token" in text


def test_liger_replaces_norms_rotary_embeddings_and_mlps_and_not_the_lm_head(recipe):
    liger = load_recipe(recipe, overrides=["--use_liger_kernel=true"]).parse(world_size=1)[0].liger_kernel_config
    assert all(liger[name] for name in ("rope", "rms_norm", "swiglu"))
    assert not liger["fused_linear_cross_entropy"] and not liger["cross_entropy"]
    own = ["--use_liger_kernel=true", "--liger_kernel_config.rope=false"]
    assert load_recipe(recipe, overrides=own).parse(world_size=1)[0].liger_kernel_config == liger | {"rope": False}
    assert load_recipe(recipe).parse(world_size=1)[0].liger_kernel_config is None


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
    assert "dataset_test_split" in problems(recipe, overrides=["--test_split_size=0.1", "--dataset_test_split=dev"])
    assert "dataset_config" in problems(recipe, overrides=["--datasets=[{path: a}]", "--dataset_config=x"])


def test_prefer_local_takes_a_finished_run_and_says_so(write, tmp_path):
    local = tmp_path / "outputs" / "sft"
    recipe = write("rmipo.yaml", RECIPE | {"prefer_local": str(local), "model_revision": "v1"})

    def loaded(*overrides):
        result = load_recipe(recipe, overrides=overrides)
        assert "prefer_local" not in result.values
        # A revision is one of the public model, and no other's.
        assert result.values.get("model_revision") == ("v1" if "some/" in result.values["model_name_or_path"] else None)
        return result.values["model_name_or_path"], " ".join(result.notices)

    assert loaded() == ("some/model", f"model_name_or_path: some/model, because {local} holds no finished run")
    local.mkdir(parents=True)
    (local / "run.json").write_text(json.dumps({"finished": False, "recipe": {}}))
    assert loaded()[0] == "some/model"
    (local / "run.json").write_text(json.dumps({"finished": True, "recipe": {}}))
    model, notice = loaded()
    assert model == str(local) and "in place of some/model" in notice
    assert loaded("--model_name_or_path", "x/y")[0] == "x/y"


def test_numbers_and_dates_are_read_as_people_write_them(write):
    written = "learning_rate: 2e-5\nrun_name: 2024-05-01\neval_strategy: no\nseed: 0042\nmax_length: 4_096\n"
    text = yaml.safe_dump({key: value for key, value in RECIPE.items() if key != "learning_rate"}) + written
    values = load_recipe(write("rmipo.yaml", text), overrides=["--data_seed=0x10"]).values
    assert (values["learning_rate"], values["run_name"], values["eval_strategy"]) == (2e-5, "2024-05-01", "no")
    assert (values["seed"], values["max_length"], values["data_seed"]) == (42, 4096, 16)
    for text in ("1:30", "1_0", "1_6.0"):
        for key in ("save_steps", "objective.gamma_max"):
            assert key in problems(write("rmipo.yaml", RECIPE), overrides=[f"--{key}={text}"])


@pytest.mark.parametrize(
    "override",
    [
        # No key, a wrong type, another objective's key
        "override", "--learning_rat=1", "--learning_rate=fast", "--learning_rate=.nan", "--max_length=2.5", "--max_length=true",
        "--lr_scheduler_type=cos", "--attention=flash", "--dtype=fp8", "--datasets=all", "--beta=2", "--objective=rmipo",
        "--objective.gamma_beta_ratio=0.5", "--objective.name=grpo", "--chat_template=none.jinja",
        # Missing, contradicting or refused
        "--model_name_or_path=null", "--datasets=[]", "--max_length=1800", "--gradient_accumulation_steps=4",
        "--attn_implementation=sdpa", "--auto_find_batch_size", "--bf16_full_eval", "--lora_r=8", "--resume_from_checkpoint=x",
        "--hub_token=anything", "--label_smoothing_factor=0.1", "--push_to_hub", "--dataloader_drop_last=true",
        "--output_dir=out/run[1]", "--max_steps=0", "--fp16", "--optim_args=rank=64", "--optim_target_modules=[q_proj]",
        "--use_dora=true", "--liger_kernel_config.fused_linear_cross_entropy=true",
        # Out of range, most of them taken by the libraries without a word
        "--max_dropped_fraction=2", "--global_batch_size=0", "--learning_rate=0", "--num_train_epochs=0", "--save_steps=0",
        "--eval_steps=0", "--max_grad_norm=-1", "--per_device_train_batch_size=0", "--per_device_eval_batch_size=0",
        "--generation_samples=-1", "--max_tokens_per_micro_batch=0", "--max_prompt_length=0",
        "--test_split_size=1.0", "--test_split_size=0",
    ],
)  # fmt: skip
def test_each_mistake_is_named(recipe, override):
    key = override.lstrip("-").partition("=")[0]
    assert key in problems(recipe, overrides=[override])


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ("[{path: a, weight: 1.5}]", "datasets[0].weight"),
        ("[{path: a}, {path: b, fraction: 0}]", "datasets[1].fraction"),
        ("[{path: a, columns: 3}]", "datasets[0].columns"),
        ("[{path: a, wieght: 1}]", "datasets[0].wieght"),
        ("[{weight: 1}]", "datasets[0].path"),
        ("[{path: a, fraction: 1}, {path: b}]", "fraction"),
    ],
)
def test_mistakes_in_a_mixture_name_the_entry(write, entries, named):
    path = write("rmipo.yaml", {key: value for key, value in RECIPE.items() if not key.startswith("dataset")})
    assert named in problems(path, overrides=[f"--datasets={entries}"])


def test_all_mistakes_are_reported_at_once_with_their_file(write, recipe):
    overlay = write("overlay.yaml", {"max_lenght": 10, "per_device_train_batch_size": "two"})
    overrides = ["--objective.gamma", "1", "--seed", "x", "--max_length", "100", "--gamma_beta_ratio", "1"]
    text = problems(recipe, [overlay], overrides)
    named = [f"{overlay}: max_lenght", "max_length?", f"{overlay}: per_device_train_batch_size is 'two'"]
    named += ["line: seed is 'x'", "max_prompt_length is 1800", "objective.gamma ", "objective.gamma_beta_ratio"]
    assert text.startswith(f"{recipe} ") and [part for part in named if part not in text] == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "seed"),
        ("objective: {name: rmipo, beta: 1, beta: 2}\n", "beta"),
        ("- a\n- b\n", "key: value"),
        ("", "key: value"),
        ("a: [1\n", "broken.yaml"),
        ("chat_template: {{ bos_token }}\n", "line 1"),
        ("base: gone.yaml\n", "gone.yaml"),
        ("base: broken.yaml\n", "its own base"),
        ("seed: !!python/object/apply:os.system ['true']\n", "broken.yaml"),
    ],
)
def test_broken_files_are_named(write, text, named):
    path = write("broken.yaml", text)
    assert str(path.parent) in problems(path) and named in problems(path)


def test_keys_of_preference_recipes_are_refused_in_sft(write):
    sft = {key: value for key, value in RECIPE.items() if key != "objective"}
    assert load_recipe(write("sft.yaml", sft)).stage == "sft"
    # Read as a preference recipe without an objective.
    assert "objective.name" in problems(write("sft.yaml", sft | {"attention": "auto"}))
    assert "bf16_full_eval" in problems(write("sft.yaml", sft), overrides=["--bf16_full_eval"])


def test_the_batch_the_device_and_uploads_follow_from_the_recipe(recipe, monkeypatch):
    for per_device, world_size, accumulation in ((2, 4, 16), (1, 1, 128), (8, 16, 1)):
        loaded = load_recipe(recipe, overrides=["--per_device_train_batch_size", str(per_device)])
        assert loaded.batch(world_size) == (128, accumulation)
    for gpus in (0, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert load_recipe(recipe, overrides=["--use_cpu", "auto"]).values["use_cpu"] is (gpus == 0)
    args = load_recipe(recipe).parse(world_size=1)[0]
    assert (args.hub_strategy.value, args.hub_private_repo) == ("end", True)
    assert load_recipe(recipe, overrides=["--hub_private_repo=false"]).parse(world_size=1)[0].hub_private_repo is False


def test_micro_batches_of_tokens_where_a_loss_depends_on_its_micro_batch(write):
    def parse(objective):
        path = write("rmipo.yaml", RECIPE | {"objective": objective})
        return load_recipe(path, overrides=["--max_tokens_per_micro_batch=4096"]).parse(world_size=1)[0]

    assert parse({"name": "cpo", "sft_normalization": "sequence"}).max_tokens_per_micro_batch == 4096
    with pytest.raises(ConfigError, match="max_tokens_per_micro_batch"):
        parse({"name": "cpo"})


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-6", float, 1e-6), (2, float, 2), ("3", int, 3), (3.0, int, 3), ("true", bool, True), ("3", str | None, "3"),
        (False, IntervalStrategy | str, "no"), ("steps", IntervalStrategy | str, "steps"), ("a", list[str], ["a"]),
        (0.5, int | float | None, 0.5), (2, int | float | None, 2), (None, int | None, None),
        ({"a": 1}, dict | str | None, {"a": 1}),
        (True, int, ValueError), (True, float, ValueError), (2.5, int, ValueError), ("nan", float, ValueError),
        (float("inf"), float, ValueError), (3, str, ValueError), ("x", list[dict], ValueError),
        ("cos", IntervalStrategy | str, ValueError), ("{a: b}", float, ValueError), (True, str | None, ValueError),
    ],
)  # fmt: skip
def test_values_are_brought_to_their_types_or_refused(value, annotation, expected):
    if expected is ValueError:
        with pytest.raises(ValueError):
            coerce(value, annotation)
    else:
        typed = coerce(value, annotation)
        assert (typed, type(typed)) == (expected, type(expected))


def test_a_template_s_file_may_begin_with_a_mark_of_its_encoding(write, tmp_path):
    (tmp_path / "bom.jinja").write_text("{{ bos_token }}", "utf-8-sig")
    (tmp_path / "latin.jinja").write_text("é", "latin-1")
    assert template_text(f"{tmp_path}/bom.jinja") == "{{ bos_token }}"
    with pytest.raises(ConfigError, match=r"chat_template is '.*latin\.jinja'"):
        load_recipe(write("rmipo.yaml", RECIPE), overrides=[f"--chat_template={tmp_path}/latin.jinja"])
