"""Hours by hand: FLOPs of the step, of what is computed again, of the phases around it."""

import pytest

from rmipo.plan import duration
from rmipo.plan.gpus import A100, speed_with
from rmipo.plan.memory import Hardware, Shape, Sharding
from rmipo.plan.preflight import run_of
from rmipo.plan.shapes import load_config
from rmipo.recipe.load import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.plans import make_run

LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
HEAD = 128256 * 4096


@pytest.fixture(scope="module")
def shape():
    return Shape.of(load_config(LLAMA3_8B))


def test_a_plain_step_is_six_flops_per_weight_and_token(shape):
    plain = make_run(prior=False, checkpoint_every=0, fused_head=False)
    weights_only = 6 * (shape.body * (220 + 640) + HEAD * 640)
    assert 1.0 < duration.step_flops(shape, plain) / weights_only < 1.03  # attention adds little at these lengths
    attention = 6 * 32 * 4096 * (220 + 320) * (220 + 640)
    assert duration.step_flops(shape, plain) == weights_only + attention


def test_what_is_computed_again_or_besides(shape):
    plain = make_run(prior=False, checkpoint_every=0, fused_head=False)
    layers, head = duration.forward_flops(shape, plain)

    def extra(**changes):
        return duration.step_flops(shape, make_run(**{**PLAIN, **changes})) - duration.step_flops(shape, plain)

    PLAIN = {"prior": False, "checkpoint_every": 0, "fused_head": False}
    assert extra(checkpoint_every=1) == pytest.approx(layers)
    assert extra(checkpoint_every=2) == pytest.approx(layers / 2)
    assert extra(checkpoint_every=5) == pytest.approx(layers * 7 / 32)  # layers 0, 5, ..., 30
    assert extra(fused_head=True) == pytest.approx(head)
    assert extra(reference="logits") == pytest.approx(layers + head)
    # Responses attend to themselves alone, 320 tokens each.
    assert extra(prior=True) == pytest.approx(2 * (shape.body + HEAD) * 640 + 2 * 32 * 4096 * 320 * 640)
    assert extra(adapters=True) == pytest.approx(-(layers + head))


def test_phases_of_a_run(shape):
    recipe = load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", [ROOT / "recipes/methods/dpo.yaml"])
    run, four = run_of(recipe), Hardware(1, 4, 80)
    phases = duration.hours(recipe, shape, run, Sharding("zero3"), four, 60_000, A100)
    reached = 4 * 312e12 * 3600 * 0.5
    assert phases["training"][0] == pytest.approx(60_000 * duration.step_flops(shape, run) / reached)
    assert phases["reference pass"][0] == pytest.approx(60_000 * sum(duration.forward_flops(shape, run)) / reached)
    # Evaluated and sampled at each quarter and at the end, saved at each half.
    assert phases["evaluation"][0] == pytest.approx(5 * 2000 / 60_000 * phases["reference pass"][0])
    assert phases["sample generations"][0] == pytest.approx(5 * 128 * 2 * shape.parameters / (100 * 2**30) / 3600)
    assert phases["saving"][0] == pytest.approx(2 * 14 * shape.parameters / 2**30 / 3600)
    assert phases["total"][1] == pytest.approx(sum(high for name, (_, high) in phases.items() if name != "total"))
    whole = duration.hours(recipe, shape, run, Sharding("none"), four, 60_000, A100)
    assert "sample generations" not in whole and whole["training"] == phases["training"]


def phases_of(shape, *overrides, hardware=None, sharding="zero3"):
    recipe = load_recipe(
        ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", [ROOT / "recipes/methods/dpo.yaml"], list(overrides)
    )
    hardware = hardware or Hardware(1, 4, 80)
    return duration.hours(recipe, shape, run_of(recipe), Sharding(sharding), hardware, 60_000, A100)


def test_what_phases_follow_from(shape):
    phases = phases_of(shape)
    low, high = phases["training"]
    assert low / high == pytest.approx(0.35 / 0.5) and low < high
    again = phases_of(shape, "--num_train_epochs=2")
    assert again["training"] == pytest.approx([2 * low, 2 * high])
    assert again["reference pass"] == phases["reference pass"]  # the reference is scored once
    few = phases_of(shape, "--max_eval_samples=100")
    assert few["evaluation"][0] == pytest.approx(phases["evaluation"][0] / 20)
    weights = phases_of(shape, "--save_only_model")
    assert weights["saving"][0] == pytest.approx(phases["saving"][0] * 2 / 14)
    more = phases_of(shape, "--generation_samples=8", "--generation_max_new_tokens=64")
    assert more["sample generations"][0] == pytest.approx(
        phases["sample generations"][0] / 2
    )  # one batch, half as long


def test_nodes_gather_over_a_slower_link_and_one_gpu_gathers_nothing(shape):
    one, two = (phases_of(shape, hardware=Hardware(nodes, 8, 80)) for nodes in (1, 2))
    assert two["sample generations"][0] == pytest.approx(5 * one["sample generations"][0])
    assert two["training"][0] == pytest.approx(one["training"][0] / 2)
    assert "sample generations" not in phases_of(shape, hardware=Hardware(1, 1, 80))


def test_a_dialogue_goes_through_all_layers_and_the_head(shape):
    run = make_run(stage="sft", prior=False, checkpoint_every=0, fused_head=False)
    expected = 6 * (shape.body + HEAD) * 1100 + 6 * 32 * 4096 * 1100 * 1100
    assert duration.step_flops(shape, run) == expected


@pytest.mark.parametrize(("tflops", "least"), [(989.0, 4.0), (312.0, 9.3)])
def test_a_step_on_four_gpus_takes_at_least_what_a_review_says(shape, tflops, least):
    """Independent figures for 4 x 80 GB with every layer computed again: 4.0 s on H100, 9.3 s on A800."""
    recipe = load_recipe(ROOT / "recipes/llama3-8b-instruct/rmipo.yaml")
    run = make_run(max_tokens=8192)
    phases = duration.hours(recipe, shape, run, Sharding("zero3"), Hardware(1, 4, 80), 128, speed_with(tflops))
    low, high = (hours * 3600 for hours in phases["training"])
    assert least * 0.95 < low < high < 3 * least


def test_a_prior_of_the_initial_policy_is_one_pass_over_the_responses(shape):
    recipe = load_recipe(
        ROOT / "recipes/llama3-8b-instruct/rmipo.yaml", overrides=["--objective.prior_model", "initial"]
    )
    run = run_of(recipe)
    assert not run.prior  # in the step there is none
    hours = duration.hours(recipe, shape, run, Sharding("zero3"), Hardware(1, 4, 80), 60_000, A100)["reference pass"]
    flops = 2 * (shape.body + HEAD) * 640 * 60_000  # attention among the responses adds 2%
    assert hours[0] == pytest.approx(flops / (4 * 312e12 * 3600) / 0.5, rel=0.02)
