"""The gradient of a step that is cut by tokens is that of one cut by pairs, in one process and in two."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from rmipo.objectives import build_objective
from tests.test_scoring import make_pairs
from tests.test_trainer import make_trainer
from tests.token_batches_worker import gradients


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
        command = [sys.executable, "-m", "tests.token_batches_worker", str(tmp_path), "90"]
        processes.append(subprocess.Popen(command, env=os.environ | launch | {"ACCELERATE_USE_CPU": "true"}))
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    (first, sizes), (second, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert sum(sizes + others) == 13 and len(sizes) == len(others) == 3
    assert_equal(first, by_pairs)
    assert_equal(second, by_pairs)


def test_refused_where_the_micro_batch_is_part_of_the_loss(tmp_path):
    objective = {"name": "kto", "beta": 0.1}
    assert build_objective(objective).min_pairs > 1
    with pytest.raises(ValueError, match="found 90 with objective kto, whose loss depends on which pairs share"):
        make_trainer(tmp_path, make_pairs(4), objective=objective, max_tokens_per_micro_batch=90)
