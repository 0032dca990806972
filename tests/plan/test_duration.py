"""Hours by hand: FLOPs of the step, of what is computed again, of the pass around it; steps and examples."""

import pytest

from rmipo.plan import duration
from rmipo.plan.duration import A100
from rmipo.plan.preflight import workload_of
from rmipo.plan.shapes import Shape, load_config
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.plans import make_work
from tests.helpers.twins import make_twin

LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
HEAD = 128256 * 4096
RECIPE, DPO = ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", ROOT / "recipes/methods/dpo.yaml"
PLAIN = {"prior": False, "checkpoint_every": 0, "fused_head": False}


@pytest.fixture(scope="module")
def shape():
    return Shape.of(load_config(LLAMA3_8B))


def test_a_plain_step_is_six_flops_per_weight_and_token(shape):
    weights = 6 * (shape.body * (220 + 640) + HEAD * 640)
    attention = 6 * 32 * 4096 * (220 + 320) * (220 + 640)
    assert duration.step_flops(shape, make_work(**PLAIN)) == weights + attention
    dialogue = 6 * (shape.body + HEAD) * 1100 + 6 * 32 * 4096 * 1100 * 1100
    assert duration.step_flops(shape, make_work(stage="sft", **PLAIN)) == dialogue


def test_what_is_computed_again_or_besides(shape):
    plain = make_work(**PLAIN)
    layers, head = duration.forward_flops(shape, plain)

    def extra(**changes):
        return duration.step_flops(shape, make_work(**{**PLAIN, **changes})) - duration.step_flops(shape, plain)

    assert extra(checkpoint_every=1) == pytest.approx(layers)
    assert extra(checkpoint_every=5) == pytest.approx(layers * 7 / 32)  # layers 0, 5, ..., 30
    assert extra(fused_head=True) == pytest.approx(head)
    assert extra(reference="logits") == pytest.approx(layers + head)
    # Responses attend to themselves alone, 320 tokens each.
    assert extra(prior=True) == pytest.approx(2 * (shape.body + HEAD) * 640 + 2 * 32 * 4096 * 320 * 640)
    assert extra(adapters=True) == pytest.approx(-(layers + head))


def test_hours_are_the_arithmetic_over_what_gpus_reach(shape):
    work = workload_of(load_recipe(RECIPE, [DPO]))
    # 469 steps of 128 pairs, and the reference, which is scored once, on all 60,000.
    flops = 469 * 128 * duration.step_flops(shape, work) + 60_000 * sum(duration.forward_flops(shape, work))
    low, high = duration.hours(shape, work, 4, 60_000, 469, A100)
    assert (low, high) == pytest.approx((flops / (4 * 312e12 * 0.5) / 3600, flops / (4 * 312e12 * 0.35) / 3600))
    # Two dialogues of 1,100 tokens to a packed row.
    packed, plain = (make_work(stage="sft", packing=packing, max_length=2200, prior=False) for packing in (True, False))
    of_packed, of_plain = (duration.hours(shape, each, 4, 1, 10, A100)[0] for each in (packed, plain))
    assert of_packed == pytest.approx(2 * of_plain)


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


def test_a_prior_of_the_initial_policy_is_one_pass_over_the_responses(shape):
    work = workload_of(load_recipe(RECIPE, overrides=["--objective.prior_model", "initial"]))
    assert not work.prior  # in the step there is none
    flops = 2 * (shape.body + HEAD) * 640  # attention among the responses adds 2%
    assert duration.reference_flops(shape, work) == pytest.approx(flops, rel=0.02)
