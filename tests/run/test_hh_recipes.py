"""The Anthropic-HH pair of recipes: on rows as the hub publishes them, and on real ones where they are at hand."""

import gzip
import json
import random

from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import load_pairs, tokenize_pairs
from rmipo.launch.choices import choose_stages
from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import DataConfig
from rmipo.record import read_metrics
from tests.helpers.families import make_tokenizer, save
from tests.helpers.launched import launch

SUBSETS = ("helpful", "harmless")
WORDS = ("how", "do", "I", "learn", "this", "well", "please", "tell", "me", "more", "of", "course", "here")


def setting(subset):
    return f"llama3-8b-instruct-hh-{subset}"


def hub_row(draw, turns):
    """Texts in the hub's form; the last turn differs."""

    def words():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))

    shared = "".join(f"\n\nHuman: {words()}\n\nAssistant: {words()}" for _ in range(turns - 1))
    shared += f"\n\nHuman: {words()}\n\nAssistant: "
    return {"chosen": shared + words() + " A", "rejected": shared + words() + " B"}


def write_hub(folder, subset, train=40, test=3):
    """`folder`/<subset>-base/{train,test}.jsonl.gz, as `.venv/bin/hf download Anthropic/hh-rlhf` lays them out."""
    draw = random.Random(subset)
    (folder / f"{subset}-base").mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        with gzip.open(folder / f"{subset}-base" / f"{split}.jsonl.gz", "wt") as file:
            for number in range(rows):
                file.write(json.dumps(hub_row(draw, turns=1 + number % 3)) + "\n")
    return folder


def test_the_two_differ_in_subset_and_folder_alone():
    recipes = {subset: load_recipe(f"recipes/{setting(subset)}/rmipo.yaml").values for subset in SUBSETS}
    differing = {key for key in recipes["helpful"] if recipes["helpful"][key] != recipes["harmless"][key]}
    assert differing == {"datasets", "output_dir"}
    for subset, values in recipes.items():
        (entry,) = values["datasets"]
        assert (entry["path"], entry["data_dir"]) == ("Anthropic/hh-rlhf", f"{subset}-base")
        assert choose_stages({"MODEL": setting(subset)}) == (setting(subset), ["rmipo"])
    base = load_recipe("recipes/llama3-8b-instruct/rmipo.yaml").values
    assert {key for key in base if base[key] != recipes["helpful"].get(key)} == {
        "dataset_name", "dataset_revision", "dataset_train_split", "dataset_test_split", "output_dir",
    }  # fmt: skip


def test_recipe_trains_a_twin_on_hub_rows(tmp_path, subset="helpful"):
    save("llama3", tmp_path / "model")
    write_hub(tmp_path / "hh", subset)
    overrides = {
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "run", "dtype": "float32", "bf16": "false",
        "datasets": json.dumps([{"path": str(tmp_path / "hh"), "data_dir": f"{subset}-base"}]), "use_cpu": "true",
        "dataset_num_proc": 2,  # processes of their own, as in the recipes
        "max_steps": 2, "global_batch_size": 16, "warmup_steps": 0, "learning_rate": 1e-3, "eval_strategy": "no",
        "save_strategy": "no", "report_to": "none", "generation_samples": 1, "generation_max_new_tokens": 2,
    }  # fmt: skip
    arguments = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    training = launch(["scripts/preference.py", "--config", f"recipes/{setting(subset)}/rmipo.yaml", *arguments])
    assert training.wait() == 0, training.output[-4000:]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert len(losses) == 2 and losses[1] != losses[0]
    assert run["finished"] and run["data"]["train"]["kept"] == 40 and run["data"]["test"]["kept"] == 3
    assert 0 <= run["results"]["eval_common/acc_avg_logp"] <= 1


def test_real_harmless_pairs_pass_the_recipes_limits(shared_data):
    values = load_recipe("recipes/llama3-8b-instruct-hh-harmless/rmipo.yaml").values
    data = DataConfig(dataset_name=str(shared_data / "hh-harmless"))
    limits = {key: values[key] for key in ("max_length", "max_prompt_length", "max_dropped_fraction")}
    chat = ChatFormat.probe(make_tokenizer("llama3"))
    tokenized, report = tokenize_pairs(load_pairs(data, "test"), chat, max_truncated_fraction=1.0, **limits)
    assert report.rows == 300 and len(tokenized) == report.kept >= 294
    multi_turn = [ids for ids in tokenized["prompt_ids"] if ids.count(chat.end_id) > 2]
    assert len(multi_turn) > 100  # these are dialogues, not single questions
