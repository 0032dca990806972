"""What vLLM is started with, on a stand-in for it: the tests run without vLLM."""

import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from rmipo.evaluation import leaderboard
from rmipo.generation.answers import check_settings
from rmipo.generation.engines import VllmEngine
from tests.helpers.tiny_model import write_model


@pytest.fixture(params=["answers", "leaderboard"])
def start(request, tmp_path, monkeypatch):
    """start(dtype of the weights, dtype asked for) -> what vLLM is started with, and what was done with the GPU before."""
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("memory released"))

    class LLM:
        def __init__(self, **arguments):
            self.arguments, self.done = arguments, list(done)

    def run(weights, dtype):
        write_model(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=weights).save_pretrained(tmp_path)
        if request.param == "answers":
            monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM))
            model = VllmEngine(tmp_path, check_settings({"dtype": dtype}), [1]).model
        else:
            registry = pytest.importorskip("lm_eval.api.registry")
            model = types.SimpleNamespace(create_from_arg_obj=lambda arguments, more: LLM(**arguments))
            monkeypatch.setattr(registry, "get_model", {"vllm": model}.get)
            model = leaderboard.load(tmp_path, leaderboard.DEFAULTS | {"engine": "vllm", "dtype": dtype})
        return model.arguments, model.done

    return run


def test_auto_is_the_dtype_of_the_weights(start):
    for weights in (torch.float32, torch.bfloat16):
        assert start(weights, "auto")[0]["dtype"] == weights
    assert start(torch.float32, "bfloat16")[0]["dtype"] == "bfloat16"


def test_no_code_and_no_pickle_is_loaded_and_memory_is_released_before(start):
    arguments, done = start(torch.float32, "float32")
    assert arguments["trust_remote_code"] is False and arguments["load_format"] == "safetensors"
    assert done == ["memory released"]
