"""The blocks of docs/DATA.md are accepted as they stand."""

import math
import re
from pathlib import Path

import pytest
import yaml

from rmipo.data.chat import ChatFormat
from rmipo.data.dialogues import load_dialogues
from rmipo.data.formats import read_prompt, unusable_dialogue, unusable_pair, unusable_prompt
from rmipo.data.pairs import load_pairs
from rmipo.data.sources import load_converted
from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import DataConfig
from tests.helpers.families import make_tokenizer, save
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, user, write

TEXT = (ROOT / "docs/DATA.md").read_text()
BLOCKS = re.findall(r"```(\w+) (\w+)\n(.*?)```", TEXT, re.DOTALL)


def rows(kind):
    return [block for language, name, block in BLOCKS if (language, name) == ("jsonl", kind)]


@pytest.mark.parametrize("block", rows("pairs"))
def test_pairs_say_what_is_asked_and_answered(block, tmp_path):
    (tmp_path / "train.jsonl").write_text(block)
    pairs = load_pairs(DataConfig(dataset_name=str(tmp_path)), "train")
    expected = {"What is 2 + 2?": ("4.", "Good question!"), "Capital of France?": ("Paris.", "It depends.")}
    for pair, (question, answers) in zip(pairs, expected.items(), strict=True):
        assert pair["prompt"][-1] == {"role": "user", "content": question}
        assert tuple(pair[side][0]["content"].strip() for side in ("chosen", "rejected")) == answers
        assert unusable_pair(pair["prompt"], pair["chosen"], pair["rejected"]) is None
        ChatFormat.probe(make_tokenizer("llama3")).pair_ids(pair["prompt"], pair["chosen"], pair["rejected"])
    assert len(rows("pairs")) >= 4


@pytest.mark.parametrize("block", rows("dialogues"))
def test_dialogues_can_be_trained(block, tmp_path):
    (tmp_path / "train.jsonl").write_text(block)
    dialogues = load_dialogues(DataConfig(dataset_name=str(tmp_path)), "train")
    assert [unusable_dialogue(row["messages"]) for row in dialogues] == [None, None]


def test_prompts_can_be_answered(tmp_path):
    (block,) = rows("prompts")
    (tmp_path / "train.jsonl").write_text(block)
    prompts = load_converted(DataConfig(dataset_name=str(tmp_path)), "train", read_prompt, ("prompt",))
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


README = Path(__file__).parents[1] / "README.md"
FIVE_LINES, OTHER_METHOD, LOSS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What the hub names of the examples stand for: a small model and pairs in the form of that dataset."""
    folder = tmp_path_factory.mktemp("readme")
    save("llama3", folder / "model", max_position_embeddings=2048)
    answers = [(f"q{i}", f"yes {i}", "no") for i in range(20)]
    rows = [{"chosen": [user(q), assistant(yes)], "rejected": [user(q), assistant(no)]} for q, yes, no in answers]
    write(folder / "pairs/train.jsonl", rows)
    return folder


@pytest.mark.parametrize(("code", "output"), [(FIVE_LINES, "smollm2-rmipo"), (OTHER_METHOD, "simpo")])
def test_the_trainers_of_the_examples_train(code, output, local, tmp_path):
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", f"{local}/model")
    code = code.replace("trl-lib/ultrafeedback_binarized", f"{local}/pairs")
    before = f"import os; os.chdir({str(tmp_path)!r})\nfrom datasets import load_dataset\n"
    before += f"pairs = load_dataset('{local}/pairs', split='train')\n"
    run = launch(["-c", f"{before}{code}\ntrainer.save_model(); print(trainer.train())"])
    assert run.wait() == 0, run.output[-3000:]
    assert (tmp_path / output / "model.safetensors").exists() and "20 of 20 rows used" in run.output


def test_the_loss_example_runs_and_is_right():
    names: dict = {}
    exec(LOSS, names)
    expected = []
    pairs = (-42, -55, -90, -80, 30, 32), (-310, -290, -420, -405, 210, 200)
    for chosen, rejected, prior_chosen, prior_rejected, n, m in pairs:
        delta_pmi = (chosen - prior_chosen) / n - (rejected - prior_rejected) / m
        gamma = 0.3 + 1.3 * math.exp(-max(0, delta_pmi))
        expected.append((math.log1p(math.exp(-(2 * chosen / n - 2 * rejected / m - gamma))), gamma))
    assert names["losses"].tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert names["gamma"].tolist() == pytest.approx([gamma for _, gamma in expected], rel=1e-5)
