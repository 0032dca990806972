"""The steps that the benchmarks time compute what they claim to, work is counted right, and GPU runs as far as a CPU goes."""

import itertools
import json
import logging
import runpy
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, gpu_day, lengths, measure, work
from benchmarks.contenders import BUILDERS, SAME_LOSS, Contender, Setup, build


@pytest.fixture(autouse=True)
def logging_as_before():
    """Benchmarks silence the libraries for good; tests that come after them want to hear them."""
    yield
    logging.disable(logging.NOTSET)


TINY = Setup(hidden=32, layers=2, head_dim=8, vocabulary=61)


@pytest.fixture(scope="module")
def pairs():
    return lengths.make_pairs([(5, 9, 3), (1, 1, 12), (8, 4, 4)], TINY.vocabulary, seed=1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("names", SAME_LOSS)
def test_all_ways_to_a_loss_give_the_same_loss_and_gradients(names, checkpointing, pairs):
    setup = Setup(32, 2, 8, 61, checkpointing)
    built = {name: build(name, setup, setup.model()) for name in names}
    losses = [one.step(pairs) for one in built.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)
    first, *others = (one.model for one in built.values())
    for other in others:
        for (name, expected), actual in zip(first.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_positions_and_attention_of_one_pair_by_hand():
    setup = Setup(hidden=8, layers=1, head_dim=4, vocabulary=10, checkpointing=True)
    pair = {"prompt_ids": [3] * 5, "chosen_ids": [3] * 2, "rejected_ids": [3]}
    simpo = work.step_work("simpo", [pair], setup)
    assert simpo.positions == 4 + 2 + 1
    attended = 10 + (2 * 4 + 3) + (4 + 1)
    assert simpo.attention == 4 * 8 * attended * 4.5
    assert work.step_work("rmipo", [pair], setup).positions == 7 + 4 + 3
    assert work.step_work("padded-rmipo", [pair], setup).positions == 2 * 7 + 2 * 7


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"trl-dpo"}))  # the counter misses its products with out=
def test_work_equals_the_counted_matrix_products(name, checkpointing, pairs):
    setup = Setup(32, 2, 8, 61, checkpointing)
    step = build(name, setup, setup.model()).step
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


def test_peak_memory_sees_logits_and_their_log_softmax():
    setup = Setup(hidden=64, layers=1, head_dim=16, vocabulary=2000, checkpointing=False)
    pairs = lengths.make_pairs([(4, 1500, 1500)], 2000, seed=0)
    assert measure.peak_memory(build("padded-simpo", setup, setup.model()), pairs) > 3000 * 2000 * 4 * 2


def test_contenders_take_turns_in_being_first():
    called = []
    contenders = {
        name: Contender(lambda pairs, name=name: called.append(name) or 1.0, torch.nn.Linear(1, 1))
        for name in ("rmipo", "simpo")
    }
    measure.timed_rounds(contenders, [[], [], []], tolerance=0.0)
    assert called == ["rmipo", "simpo", "simpo", "rmipo", "rmipo", "simpo"]


def test_the_rate_is_of_all_rounds():
    rounds = [{"cpu": seconds} for seconds in (1.0, 2.0, 3.0)]
    entry = {"name": "simpo", "work": {"positions": 8, "flops": 24e9}, "rounds": rounds, "memory": 2**20}
    measure.add_ratios({"simpo": entry}, clock="cpu")
    cells = measure.table({"simpo": entry}, clock="cpu").splitlines()[1].split()
    assert cells[:5] == ["simpo", "2.000", "8", "24", "4"]


def test_ranks_that_wait_for_each_other_take_longer_than_those_that_never_do():
    assert {time for _, _, time in lengths.waiting(1, pairs=4, steps=3).values()} == {1}
    assert all(1 <= time < 2 for _, _, time in lengths.waiting(2, pairs=4, steps=3).values())


def test_dry_run_writes_what_a_gpu_run_would(monkeypatch, tmp_path):
    """All contenders train the same weights; TRL's trainers meet no head that another has replaced."""
    monkeypatch.setattr(flex_attention, "_validate_device", flex_attention._validate_device)  # put back afterwards
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = tmp_path / "gpu.json"
    arguments = ["--dry", "--micro-batches", "1", "--rounds", "1", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert gpu.os.environ["CUDA_VISIBLE_DEVICES"] == "3"

    case = json.loads(path.read_text())["cases"]["micro-batch-1"]
    assert case["contenders"].keys() == BUILDERS.keys() == set(itertools.chain(*SAME_LOSS))
    assert case["out_of_memory"] == []
    assert 0 < case["parity_nats_per_token"] < 1e-4
    assert case["compiled_graphs"] > 0  # flex ran, if only by dynamo's eager backend
    for entry in case["contenders"].values():
        assert entry["memory"] > 0 and entry["tokens_per_second"] > 0 and len(entry["rounds"]) == 1


def test_a_contender_that_does_not_fit_is_named_and_left_out(pairs):
    def step(pairs):
        raise torch.OutOfMemoryError

    contenders = measure.build_all(["padded-simpo", "padded-rmipo"], TINY)
    contenders["padded-rmipo"] = contenders["padded-rmipo"]._replace(step=step)
    case = measure.run_case(contenders, TINY, [pairs, pairs])
    assert case["out_of_memory"] == ["padded-rmipo"] and list(case["contenders"]) == ["padded-simpo"]


def test_contenders_share_parameters_and_nothing_else():
    setup = Setup(hidden=32, layers=1, head_dim=8, vocabulary=61)
    weights = setup.model()
    first, second = (build("padded-simpo", setup, weights).model for _ in range(2))
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}


def test_what_a_machine_has_is_not_packed():
    found = gpu_day.installed()
    assert {"transformers", "trl", "datasets", "deepspeed"} <= found.keys() and "torch" not in found


@pytest.mark.slow
def test_every_leg_runs_and_is_not_run_again(tmp_path, capfd):
    assert gpu_day.run(tmp_path, minutes=30, dry=True) == 0
    legs = {
        path.stem: json.loads(path.read_text()) for path in (tmp_path / "dry").glob("*.json") if "-" not in path.stem
    }
    assert legs.keys() == {"kernels", "step", "liger", "resume", "study"}
    assert [code for codes in legs.values() for code in codes] == [0] * 5
    capfd.readouterr()
    assert gpu_day.run(tmp_path, minutes=30, dry=True) == 0
    assert capfd.readouterr().out.count("has passed") == 5
