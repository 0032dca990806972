"""The gradient of a step that is cut by tokens is that of one cut by pairs, in one process and in two."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from rmipo.objectives import PairScores, build_objective
from tests.helpers.token_batches_worker import gradients


@pytest.fixture(scope="module")
def by_pairs(tmp_path_factory):
    expected, sizes = gradients(tmp_path_factory.mktemp("pairs"), None)
    assert sizes == [2, 2, 2, 2, 2, 2, 1]
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    return expected


def assert_equal(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("max_tokens", [1, 90, 10**6])
def test_one_process(tmp_path, by_pairs, max_tokens):
    actual, sizes = gradients(tmp_path, max_tokens)
    assert sum(sizes) == 13 and len(sizes) == {1: 13, 90: 5, 10**6: 1}[max_tokens]
    assert_equal(actual, by_pairs)


def test_two_processes(tmp_path, by_pairs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.helpers.token_batches_worker", str(tmp_path), "90"]
        processes.append(subprocess.Popen(command, env=os.environ | launch | {"ACCELERATE_USE_CPU": "true"}))
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    (first, sizes), (second, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert sum(sizes + others) == 13 and len(sizes) == len(others) == 3
    assert_equal(first, by_pairs)
    assert_equal(second, by_pairs)


@pytest.mark.parametrize(
    "objective, matters",
    [
        ({"name": "rmipo"}, False),
        ({"name": "dpo"}, False),
        ({"name": "kto"}, True),
        ({"name": "alpha-dpo"}, True),
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
        columns = {**sums, "chosen_lengths": lengths, "rejected_lengths": lengths}
        whole = objective(PairScores(**columns)).losses.mean()
        halves = [PairScores(**{name: v[part] for name, v in columns.items()}) for part in (slice(2), slice(2, 4))]
        cut = sum(objective(half).losses.mean() for half in halves) / 2
        assert (abs(whole - cut) > 1e-3) == matters
    assert objective.micro_batch_matters == matters
