"""The blocks of docs/DATA.md are accepted as they stand."""

import re

import pytest
import yaml

from rmipo.data.chat import ChatFormat
from rmipo.data.convert import MESSAGES, load_converted
from rmipo.data.dialogues import load_dialogues
from rmipo.data.formats import PROMPTS, unusable_dialogue, unusable_pair, unusable_prompt
from rmipo.data.pairs import load_pairs
from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import DataConfig
from tests.helpers.families import make_tokenizer
from tests.helpers.paths import ROOT

TEXT = (ROOT / "docs/DATA.md").read_text()
BLOCKS = re.findall(r"```(\w+) (\w+)\n(.*?)```", TEXT, re.DOTALL)


def rows(kind):
    return [block for language, name, block in BLOCKS if (language, name) == ("jsonl", kind)]


@pytest.mark.parametrize("block", rows("pairs"))
def test_pairs_say_what_is_asked_and_answered(block, tmp_path):
    (tmp_path / "train.jsonl").write_text(block)
    pairs = load_pairs(DataConfig(dataset_name=str(tmp_path)), "train")
    for pair, question, answers in zip(
        pairs,
        ("What is 2 + 2?", "Capital of France?"),
        (("4.", "Good question!"), ("Paris.", "It depends.")),
        strict=True,
    ):
        assert pair["prompt"][-1] == {"role": "user", "content": question}
        assert tuple(pair[side][0]["content"].strip() for side in ("chosen", "rejected")) == answers
        assert unusable_pair(pair["prompt"], pair["chosen"], pair["rejected"]) is None
        ChatFormat.probe(make_tokenizer("llama3")).pair_ids(pair["prompt"], pair["chosen"], pair["rejected"])
    assert len(rows("pairs")) == 4


@pytest.mark.parametrize("block", rows("dialogues"))
def test_dialogues_can_be_trained(block, tmp_path):
    (tmp_path / "train.jsonl").write_text(block)
    dialogues = load_dialogues(DataConfig(dataset_name=str(tmp_path)), "train")
    assert [unusable_dialogue(row["messages"]) for row in dialogues] == [None, None]


def test_prompts_can_be_answered(tmp_path):
    (block,) = rows("prompts")
    (tmp_path / "train.jsonl").write_text(block)
    prompts = load_converted(DataConfig(dataset_name=str(tmp_path)), "train", PROMPTS, {"prompt": MESSAGES})
    assert [unusable_prompt(row["prompt"]) for row in prompts] == [None, None]


def test_the_recipe_builds_on_another(tmp_path):
    (_, _, block), (_, _, on_cpu) = [found for found in BLOCKS if found[1] == "recipe"]
    written = yaml.safe_load(block)
    (tmp_path / "on-cpu.yaml").write_text(on_cpu.replace("../", f"{ROOT}/recipes/"))
    assert load_recipe(tmp_path / "on-cpu.yaml").batch(1) == (8, 2)
    recipe = tmp_path / "my-model.yaml"
    recipe.write_text(block.replace("../", f"{ROOT}/recipes/"))
    values = load_recipe(recipe).values
    assert values["learning_rate"] == 5e-7 and values["global_batch_size"] == 64
    assert values["objective"]["gamma_max"] == 1.2 and values["objective"]["beta"] == 2.0
    assert values["output_dir"] == written["output_dir"]
