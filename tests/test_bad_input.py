"""Bad input to the programs, as users give it: one message that names the key, file or row, before any model is made."""

import shutil

import pytest
from transformers import PreTrainedModel

from tests.helpers.families import save
from tests.helpers.programs import run_here
from tests.helpers.rows import assistant, pair, pairs, user, write

RECIPE, SFT_RECIPE = "recipes/tiny/rmipo.yaml", "recipes/tiny/sft.yaml"
ROWS = pairs(*range(12))


def dialogues(words: int) -> list[dict]:
    return [{"messages": [user("a"), assistant("yes " * words)]}] * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(model, tmp_path, monkeypatch):
    """`refused(script, recipe, *overrides, train=rows, test=rows, **environment)`: the message that it ends with."""

    def made(self, *arguments, **keywords):
        raise AssertionError("a model was made before the input was refused")

    def run(script, recipe, *overrides, train=ROWS, test=ROWS[:3], **environment):
        for split, rows in (("train", train), ("test", test)):
            if rows:
                write(tmp_path / f"data/{split}.jsonl", rows)
        given = {"model_name_or_path": model, "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
        given |= dict(override.removeprefix("--").split("=", 1) for override in overrides)
        arguments = [f"--{key}={value}" for key, value in given.items()]
        ended = run_here(script, "--config", recipe, *arguments, env=environment)
        assert ended.code == 2 and "error: " in ended.err, ended.err[-2000:]
        return ended.err.partition("error: ")[2]

    monkeypatch.setattr(PreTrainedModel, "__init__", made)
    return run


@pytest.mark.parametrize(
    ("overrides", "named", "given"),
    [
        (["--metric_for_best_model=accuracy"], ["metric_for_best_model", "eval_loss"], {}),
        ([], ["global_batch_size", "(3)"], {"WORLD_SIZE": "3"}),
        (["--dataset_name=some/pairs"], ["some/pairs", "hf auth login"], {}),
        (["--model_name_or_path=some/model"], ["some/model", "HF_HUB_OFFLINE"], {}),
        (["--max_length=1000000"], ["max_length"], {}),
        ([], ["test: 1 of 4 rows", "chosen is empty: row 0"], {"test": [pair(0, chosen=[assistant(" ")]), *ROWS[1:4]]}),
    ],
)
def test_preference_training(refused, overrides, named, given):
    message = refused("preference", RECIPE, *overrides, **given)
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize(
    ("overrides", "named", "words"),
    [
        (["--max_truncated_fraction=0.5"], ["train: 12 of 12 rows", "max_truncated_fraction: 0.5"], 300),
        (["--max_length=null"], ["max_length", "2048"], 3000),  # nothing is cut
    ],
)
def test_supervised_training(refused, overrides, named, words):
    message = refused("sft", SFT_RECIPE, *overrides, train=dialogues(words), test=dialogues(words))
    assert [part for part in named if part not in message] == []


def test_a_model_without_a_chat_template(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert "`chat_template`" in refused("preference", RECIPE, f"--model_name_or_path={folder}")


@pytest.mark.parametrize(
    ("script", "recipe", "named"),
    [
        ("preference", SFT_RECIPE, "scripts/sft.py"),
        ("sft", RECIPE, "scripts/preference.py"),
        ("preference", "recipes/llama3-8b-instruct/rmipo.yaml", "MODEL=tiny"),  # without a GPU
    ],
)
def test_a_recipe_of_another_program_or_for_another_machine(refused, script, recipe, named):
    assert named in refused(script, recipe)
