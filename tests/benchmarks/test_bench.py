"""The steps that the benchmark times compute what they claim to, and its work model counts right."""

import itertools
import types

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import lengths, micro_batches, report, work
from benchmarks.contenders import BUILDERS, SAME_LOSS, Setup, build
from benchmarks.measure import peak_activations, timed_rounds

TINY = Setup(hidden=32, layers=2, head_dim=8, vocabulary=61)


@pytest.fixture(scope="module")
def pairs():
    return lengths.make_pairs([(5, 9, 3), (1, 1, 12), (8, 4, 4)], TINY.vocabulary, seed=1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("names", SAME_LOSS)
def test_all_ways_to_a_loss_give_the_same_loss_and_gradients(names, checkpointing, pairs):
    built = {name: build(name, Setup(32, 2, 8, 61, checkpointing)) for name in names}
    losses = [one.step(pairs) for one in built.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)
    first, *others = (one.model for one in built.values())
    for other in others:
        for (name, expected), actual in zip(first.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_every_contender_is_in_a_class_of_the_same_loss():
    alone = ["rmipo-initial-prior"]  # checked against a padded reference in training/test_trainer_methods.py
    assert sorted([*itertools.chain(*SAME_LOSS), *alone]) == sorted(BUILDERS)


def test_work_of_one_pair_by_hand():
    setup = Setup(hidden=8, layers=1, head_dim=4, vocabulary=10, checkpointing=True)
    pair = {"prompt_ids": [3] * 5, "chosen_ids": [3] * 2, "rejected_ids": [3]}
    layer = 8 * (2 * 8 + 2 * 4 + 3 * 28)  # heads 2, one of keys and values

    simpo = work.step_work("simpo", [pair], setup)
    assert simpo.positions == 4 + 2 + 1
    assert simpo.linear == 2 * 7 * (4 * layer - 8 * 28)
    assert simpo.head == 2 * 8 * 10 * 3 * 3
    attended = 10 + (2 * 4 + 3) + (4 + 1)
    assert simpo.attention == 4 * 8 * attended * 4.5

    rmipo = work.step_work("rmipo", [pair], setup)
    assert rmipo.positions == 7 + 4 + 3
    assert rmipo.linear == simpo.linear + 2 * layer * 7

    padded = work.step_work("padded-rmipo", [pair], setup)
    assert padded.positions == 2 * 7 + 2 * 7
    assert padded.head == 2 * 8 * 10 * (14 * 3 + 14)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"trl-dpo"}))  # the counter misses its products with out=
def test_work_equals_the_counted_matrix_products(name, checkpointing, pairs):
    setup = Setup(32, 2, 8, 61, checkpointing)
    step = build(name, setup).step
    with FlopCounterMode(display=False) as counter:
        step(pairs)
    counted = sum(value for op, value in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    expected = work.step_work(name, pairs, setup)
    assert counted == expected.linear + expected.head


def test_profiles_have_the_stated_means():
    drawn = list(itertools.islice(lengths.from_profile("ultrafeedback", seed=0), 4000))
    means = [sum(part) / len(drawn) for part in zip(*drawn, strict=True)]
    assert means == pytest.approx([165, 315, 270], rel=0.06)
    assert max(sum(pair[:2]) for pair in drawn) <= 2048
    # Of the prompt the responses know nothing, but long ones, which the limits cut.
    related = np.corrcoef(np.log(np.array([pair for pair in drawn if sum(pair[:2]) < 2000])).T)
    assert related[1, 2] == pytest.approx(0.6, abs=0.05) and np.abs(related[0, 1:]).max() < 0.1


def test_peak_memory_sees_a_larger_batch():
    setup = Setup(hidden=64, layers=1, head_dim=16, vocabulary=2000, checkpointing=False)
    small, large = (lengths.make_pairs([(4, n, n)], 2000, seed=0) for n in (8, 1500))
    extra = peak_activations("padded-simpo", setup, small, large)
    assert extra > 3000 * 2000 * 4 * 2  # logits and their log-softmax


def test_contenders_take_turns_in_being_first():
    called = []
    contenders = {
        name: types.SimpleNamespace(
            model=torch.nn.Linear(1, 1), step=lambda pairs, name=name: called.append(name) or 1.0
        )
        for name in ("rmipo", "simpo")
    }
    timed_rounds(contenders, [[], [], []], tqdm(disable=True), tolerance=0.0)
    assert called == ["rmipo", "simpo", "simpo", "rmipo", "rmipo", "simpo"]


def test_the_rate_is_of_all_rounds():
    work_done = {"positions": 8, "flops": 24e9}  # in all three rounds
    entry = {"name": "simpo", "work": work_done, "rounds": [{"cpu": seconds} for seconds in (1.0, 2.0, 3.0)]}
    case = {"contenders": {"simpo": entry}}
    report.add_ratios(case, ("simpo",), clock="cpu")
    assert report.table(case, clock="cpu").splitlines()[1].split()[:5] == ["simpo", "2.000", "8", "24", "4"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_wait_for_each_other_take_longer_than_those_that_never_do(ranks):
    times = {cut: time for cut, (_, _, time) in micro_batches.waiting(ranks, pairs=4, steps=3).items()}
    assert (min(times.values()) == max(times.values()) == 1) if ranks == 1 else 1 <= min(times.values()) < 2
