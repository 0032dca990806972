"""The GPU benchmark as far as a CPU runs it: the same program, with flex attention and the fused head."""

import dataclasses
import json
import math
import runpy
import sys

import pytest
import torch
from torch.nn.attention import flex_attention

from benchmarks import gpu
from benchmarks.contenders import BUILDERS, Setup, build


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
    assert case["contenders"].keys() == BUILDERS.keys() and case["out_of_memory"] == []
    assert 0 < case["parity_nats_per_token"] < 1e-4
    assert case["compiled_graphs"] > 0  # flex ran, if only by dynamo's eager backend
    for name, entry in case["contenders"].items():
        assert entry["memory"] > 0 and entry["tokens_per_second"] > 0 and len(entry["rounds"]) == 1
        if name in ("rmipo", "simpo", "dpo"):  # of this size, nearly all of it is a tile of the fused head
            assert entry["planned_memory"] == pytest.approx(entry["memory"], rel=0.2)


def test_a_contender_that_does_not_fit_is_named_and_left_out():
    def step(pairs):
        raise torch.OutOfMemoryError

    setup = Setup(hidden=32, layers=1, head_dim=8, vocabulary=61)
    weights = setup.model()
    contenders = {name: build(name, setup, weights) for name in ("padded-simpo", "padded-rmipo")}
    contenders["padded-rmipo"] = dataclasses.replace(contenders["padded-rmipo"], step=step)
    case = gpu.run(setup, 1, 2, contenders, deadline=math.inf)
    assert case["out_of_memory"] == ["padded-rmipo"] and list(case["contenders"]) == ["padded-simpo"]


def test_contenders_share_parameters_and_nothing_else():
    setup = Setup(hidden=32, layers=1, head_dim=8, vocabulary=61)
    weights = setup.model()
    first, second = (build("padded-simpo", setup, weights).model for _ in range(2))
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}
