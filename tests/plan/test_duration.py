"""Hours by hand; steps and examples."""

import pytest

from rmipo.plan import duration
from rmipo.plan.duration import A100
from rmipo.plan.shapes import Shape, load_config
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.plans import make_work
from tests.helpers.twins import make_twin

LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
RECIPE = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml"
PLAIN = {"prior": False, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def shape():
    return Shape.of(load_config(LLAMA3_8B))


@pytest.mark.parametrize(
    ("changes", "of_a_pair", "once"),
    [
        ({}, 6 * 860, 0),
        ({"checkpoint_every": 1}, 8 * 860, 0),
        ({"checkpoint_every": 4}, 6.5 * 860, 0),
        ({"prior": True}, 6 * 860 + 2 * 640, 0),
        ({"adapters": True}, 4 * 860, 0),
        ({"reference": "logits"}, 8 * 860, 0),
        ({"reference": "cached"}, 6 * 860, 2 * 860),
        ({"reference": "cached prior"}, 6 * 860, 2 * 640),
        ({"stage": "sft"}, 6 * 1100, 0),
        ({"stage": "sft", "packing": True, "max_length": 2200}, 2 * 6 * 1100, 0),  # two dialogues to a row
    ],
)
def test_hours_are_the_flops_per_weight_over_what_gpus_reach(shape, changes, of_a_pair, once):
    """Ten steps of 128 pairs of 220 + 2 x 320 tokens on four A100, of 1,000 pairs."""
    flops = shape.parameters * (10 * 128 * of_a_pair + 1000 * once)
    found = duration.hours(shape, make_work(**PLAIN | changes), 4, 1000, 10, A100)
    assert found == pytest.approx((flops / (4 * 312e12 * 0.5) / 3600, flops / (4 * 312e12 * 0.35) / 3600))


@pytest.mark.parametrize(("tflops", "least"), [(989.0, 4.0), (312.0, 9.3)])
def test_a_step_on_four_gpus_takes_at_least_what_a_review_says(shape, tflops, least):
    """Independent figures for 4 x 80 GB with every layer computed again: 4.0 s on H100, 9.3 s on A800."""
    work = make_work(max_tokens=8192)
    low, high = (hours * 3600 for hours in duration.hours(shape, work, 4, 128, 1, tflops))
    assert least * 0.95 < low < high < 3 * least


def test_every_epoch_ends_with_a_step_of_what_is_left():
    def steps(examples, *overrides, **changes):
        return duration.steps(load_recipe(RECIPE, overrides=overrides), make_work(global_batch=4, **changes), examples)

    assert steps(10, "--num_train_epochs=3") == 9  # three each: 4, 4 and 2 pairs
    assert steps(10, "--num_train_epochs=0.5") == 2
    assert steps(10, "--max_steps=7") == 7
    # Two dialogues of 1,100 tokens to a row: 10 rows are 4, 4 and 2.
    assert steps(20, "--num_train_epochs=2", stage="sft", packing=True, max_length=2200) == 6


@pytest.mark.parametrize(
    ("setting", "changes", "examples"),
    [
        ("llama3-8b-base/sft", [], 207_865),
        ("llama3-8b-base/rmipo", ["--max_train_samples=1000"], 1000),
        ("llama3-8b-instruct-hh-helpful/rmipo", [], 43_835),
        ("llama3-8b-instruct/rmipo", [], None),
    ],
)
def test_examples_of_the_recipes_datasets(setting, changes, examples):
    assert duration.training_examples(load_recipe(ROOT / f"recipes/{setting}.yaml", overrides=changes)) == examples


def test_examples_that_are_here_are_counted(tmp_path):
    make_twin(tmp_path, "llama3-8b-base/rmipo", "llama3", "ultrafeedback_binarized")
    path, data = ROOT / "recipes/llama3-8b-base/rmipo.yaml", f"--dataset_name={tmp_path / 'data'}"
    assert duration.training_examples(load_recipe(path, overrides=[data])) == 40
    assert duration.training_examples(load_recipe(path, overrides=[data, "--max_train_samples=7"])) == 7
