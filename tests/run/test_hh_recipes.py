"""The Anthropic-HH pair of recipes: on rows as the hub publishes them, and on real ones where they are at hand."""

import gzip
import json
import random

import pytest

from rmipo.data.pairs import load_pairs
from rmipo.launch.choices import choose_stages
from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import DataConfig

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


@pytest.mark.parametrize("subset", SUBSETS)
def test_rows_of_the_hub_become_dialogues(tmp_path, subset):
    folder = write_hub(tmp_path, subset)
    entry = {"path": str(folder), "data_dir": f"{subset}-base"}
    pairs = load_pairs(DataConfig(datasets=[entry]), "train")
    published = gzip.decompress((folder / f"{subset}-base/train.jsonl.gz").read_bytes()).decode().splitlines()
    third = json.loads(published[2])  # three questions
    assert [message["role"] for message in pairs[2]["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert [pairs[2][side][0]["content"] for side in ("chosen", "rejected")] == [
        third[side].rpartition("\n\nAssistant: ")[2] for side in ("chosen", "rejected")
    ]
    assert len(pairs) == 40 and pairs["row"] == list(range(40))
