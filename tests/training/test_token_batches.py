"""Steps cut by tokens or by pairs, in one process and in two: gradients, references, tokens per second.

And what one process finds that has to stop both: a bad loss, a signal.
"""

import math

import pytest
import torch

from rmipo.objectives import PairScores, build_objective
from tests.helpers.launched import launch
from tests.helpers.small_models import CONTEXT, make_model
from tests.helpers.two_processes_worker import DEALT, PAIRS, WITH_STATISTICS, gradients, running_statistics
from tests.references.padded import padded_pairs, rmipo_loss


@pytest.fixture(scope="module")
def by_pairs(tmp_path_factory):
    expected, sizes, loss = gradients(tmp_path_factory.mktemp("pairs"), None)
    assert sizes == [2, 2, 2, 2, 2, 2, 1]
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    model = make_model()
    expected_loss = rmipo_loss(padded_pairs(model, PAIRS, CONTEXT))
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), abs=2e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(expected[name], parameter.grad, atol=1e-4, rtol=0, msg=name)
    return expected, loss


def assert_equal(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("max_tokens", [1, 90, 10**6])
def test_one_process(tmp_path, by_pairs, max_tokens):
    actual, sizes, loss = gradients(tmp_path, max_tokens)
    assert sum(sizes) == 13 and len(sizes) == {1: 13, 90: 5, 10**6: 1}[max_tokens]
    expected, expected_loss = by_pairs
    assert_equal(actual, expected)
    assert loss == pytest.approx(expected_loss, abs=1e-6)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_model().save_pretrained(folder / "model")
    run = launch(["tests/helpers/two_processes_worker.py", str(folder)], processes=2, ACCELERATE_USE_CPU="true")
    assert run.wait() == 0, run.output[-4000:]
    assert run.output.count("log-probabilities of the initial policy:   0%") == 1
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_have_the_gradients_and_references_of_one(two_processes, by_pairs):
    (first, sizes, loss), (second, others, same_loss) = (found["gradients"] for found in two_processes)
    assert sum(sizes + others) == 13 and len(sizes) == len(others) == 3 and sum(sizes) != sum(others)
    expected, expected_loss = by_pairs
    assert_equal(first, expected)
    assert_equal(second, expected)
    assert loss == pytest.approx(expected_loss, abs=1e-6) == same_loss
    with torch.no_grad():
        expected = padded_pairs(make_model(), PAIRS)
    for found in two_processes:
        loss, scores = found["reference"]
        assert loss == pytest.approx(math.log(2), abs=1e-5)
        for side in ("chosen", "rejected"):
            wanted = expected[f"{side}_logps"].float()
            torch.testing.assert_close(scores[f"ref_{side}_logps"], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_statistics_of_two_processes_are_those_of_all_pairs(tmp_path, two_processes, name):
    expected = running_statistics(tmp_path, name)
    for found in two_processes:
        assert found["statistics"][name] == pytest.approx(expected, rel=1e-5)
    assert name != "epsilon-dpo" or abs(expected["beta"] - 0.1) > 1e-4


@pytest.mark.parametrize("name", DEALT)
def test_pairs_dealt_by_length_have_the_same_gradient_and_wait_less(two_processes, name):
    """A forward of a sharded model takes as long as the longest sequence of all processes."""
    by_length, as_they_come = zip(*(found["dealt"][name] for found in two_processes), strict=True)
    for dealt, came in zip(by_length, as_they_come, strict=True):
        assert dealt[1] == pytest.approx(came[1], abs=1e-6)
        torch.testing.assert_close(dealt[2], came[2], atol=1e-6, rtol=1e-4)
        assert came[2].abs().max() > 1e-4

    def waited_for(ranks):
        return sum(max(lengths) for lengths in zip(*(lengths for lengths, *_ in ranks), strict=True))

    assert waited_for(by_length) < waited_for(as_they_come)


def test_what_each_of_two_processes_sees_stops_and_reports(two_processes):
    for rank, found in enumerate(two_processes):
        message = found["bad loss"]
        assert "the loss of step 1 is not finite" in message and f"non_finite_rank{rank}.json" in message
    assert sorted(found["bad pairs"] for found in two_processes) == [[], [112]]
    (own, rate), (others, same_rate) = (found["tokens"] for found in two_processes)
    assert rate == pytest.approx((own + others) / 100, rel=0.1) == same_rate
    assert min(own, others) > 0.3 * (own + others)
    expected = torch.tensor([0, 1 / 3, 1, 4 / 3, 5 / 3], dtype=torch.float64)[:, None]
    for found in two_processes:
        (values, flags), columns = found["gathered"]
        assert values.dtype == torch.float64 and flags.dtype == torch.bool
        torch.testing.assert_close(values, expected, atol=1e-15, rtol=0)
        assert torch.equal(flags, expected > 1)
        found_columns = {name: values.tolist() for name, values in columns.items()}
        assert found_columns == {"a": [97] * 3 + [98] * 3, "b": [98] * 3 + [99] * 3}
    told = ["process 0", "OSError('no space for process 0')", "ValueError('bad file of process 0')"]
    for rank, found in enumerate(two_processes):
        assert found["told"] == told
        assert found["stop"] == [True] * 3  # by a signal to one of them
        assert found["marker"] == ([] if rank else [True])  # a checkpoint is complete when both have written
    first, second = (found["start"] for found in two_processes)
    date, checkpoint, fingerprints = first["seen"]
    assert second["seen"] == first["seen"] and date > "2020-02-03" and checkpoint is None
    assert fingerprints["model"] != "of process 1"
    assert first["done"] == ["W&B", "record", "record", "card", "finish", "upload", "upload"] and second["done"] == []
    assert first["ended"] is second["ended"] is None


@pytest.mark.parametrize(
    "objective, matters",
    [
        *(({"name": name}, False) for name in ("rmipo", "dpo", "ipo", "simpo", "simper", "epsilon-dpo")),
        *(({"name": name}, True) for name in ("kto", "alpha-dpo", "beta-dpo")),
        ({"name": "cpo"}, True),
        ({"name": "cpo", "sft_normalization": "sequence"}, False),
        ({"name": "slic"}, False),
        ({"name": "slic", "sft_normalization": "token"}, True),
    ],
)
def test_a_loss_says_whether_its_micro_batch_matters(objective, matters):
    """By the loss itself: four pairs at once, or two and two."""
    objective = build_objective(objective)
    if objective.min_pairs == 1:
        lengths = torch.tensor([2.0, 9.0, 30.0, 4.0])
        logps = -lengths * torch.tensor([1.0, 0.5, 2.0, 1.5])
        sums = {f"{prefix}{side}_logps": logps for prefix in ("", "ref_") for side in ("chosen", "rejected")}
        sums |= {"prior_chosen_logps": 2 * logps, "prior_rejected_logps": 3 * logps}
        sums |= {"plus_logratios": logps, "minus_logratios": -logps}
        columns = {**sums, "chosen_lengths": lengths, "rejected_lengths": lengths}
        whole = objective(PairScores(**columns)).losses.mean()
        halves = [PairScores(**{name: v[part] for name, v in columns.items()}) for part in (slice(2), slice(2, 4))]
        cut = sum(objective(half).losses.mean() for half in halves) / 2
        assert (abs(whole - cut) > 1e-3) == matters
    assert objective.micro_batch_matters == matters
