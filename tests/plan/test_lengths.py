"""Steps, examples, saves and evaluations of a run, counted by hand."""

import pytest

from rmipo.plan import lengths
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.plans import make_run

PAIRS = make_run(global_batch=4)
PACKED = make_run(stage="sft", packing=True, max_length=2200, global_batch=4)  # two dialogues of 1,100 tokens to a row


def test_every_epoch_ends_with_a_step_of_what_is_left():
    assert lengths.steps({"num_train_epochs": 3}, PAIRS, 10) == 9  # three each: 4, 4 and 2 pairs
    assert lengths.steps({}, PAIRS, 10) == 9  # transformers' three epochs
    assert lengths.steps({"num_train_epochs": 0.5}, PAIRS, 10) == 2
    assert lengths.steps({"max_steps": 7, "num_train_epochs": 3}, PAIRS, 10) == 7


def test_packed_dialogues_share_rows():
    assert lengths.steps({"num_train_epochs": 2}, PACKED, 20) == 6  # 10 rows: 4, 4 and 2
    assert lengths.examples_seen({"num_train_epochs": 2}, PACKED, 20) == 40
    assert lengths.examples_seen({"max_steps": 3}, PACKED, 20) == 3 * 4 * 2
    assert lengths.examples_seen({"max_steps": 3}, PAIRS, 20) == 3 * 4


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"save_steps": 100}, 3),  # and the last at the end
        ({"save_steps": 125}, 2),
        ({"save_steps": 0.3}, 4),
        ({}, 1),  # every 500
        ({"save_strategy": "epoch", "num_train_epochs": 1.5}, 2),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "best"}, None),
    ],
)
def test_how_often_a_run_of_250_steps_saves(values, count):
    assert lengths.occasions(values, "save", 250) == count


def test_a_run_evaluates_where_the_recipe_says():
    assert lengths.occasions({}, "eval", 250) == 0
    assert lengths.occasions({"eval_strategy": "steps", "eval_steps": 50, "save_steps": 100}, "eval", 250) == 5
    assert lengths.occasions({"eval_strategy": "steps", "eval_steps": 50}, "eval", None) is None


def test_a_mixture_with_a_part_on_the_hub_is_not_counted():
    name = "HuggingFaceH4/ultrafeedback_binarized"
    mixture = f"[{{path: {name}, split: train_prefs}}, {{path: {name}, split: train_prefs}}]"
    recipe = load_recipe(ROOT / "recipes/llama3-8b-base/rmipo.yaml", overrides=[f"--datasets={mixture}"])
    assert lengths.training_examples(recipe) is None
