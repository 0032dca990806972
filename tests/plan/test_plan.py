"""`make plan`: what it prints and refuses."""

import re
import shlex

import pytest

from tests.helpers.programs import run_here
from tests.helpers.twins import make_twin


def make_plan(**variables):
    ended = run_here("plan", env={"MODEL": "llama3-8b-instruct", **variables})
    return ended.code, ended.out + ended.err


def test_plan_prints_every_part():
    code, text = make_plan(GPUS="8x80")
    assert code == 0
    parts = ("parameters", "gradients and optimizer", "gathered", "activations", "LM head", "Disk", "GiB of 79.1: fits")
    assert [part for part in parts if part not in text] == []
    assert "8 GPUs in sequences of at most 8192 tokens" in text and "Steps: 478" in text  # 61135 pairs, 128 at a time
    hours = re.search(r"^Hours of the training: (\S+) to (\S+),", text, re.MULTILINE)
    assert 0.5 < float(hours[1]) < float(hours[2]) < 2


def test_plan_of_a_cpu_setting_speaks_of_the_cpu(tmp_path):
    make_rows = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    code, text = make_plan(MODEL="tiny", ARGS=shlex.join(make_rows))
    assert code == 0 and "CPU with" in text and "Hours: not estimated" in text


def test_plan_fails_when_the_run_cannot_fit():
    code, text = make_plan(GPUS="4x24", METHOD="dpo")
    assert code == 1 and "DOES NOT FIT" in text


def test_plan_follows_the_length_that_the_recipe_asks_for():
    _, text = make_plan(MODEL="llama3-8b-base", GPUS="8x80", ARGS="--max_train_samples=1280")
    assert "Examples: 1280, in the training data" in text and "Steps: 10," in text
    _, text = make_plan(GPUS="8x80")
    assert "Examples: 61135, assumed; EXAMPLES= says otherwise" in text
    _, text = make_plan(GPUS="8x80", EXAMPLES="1000")
    assert "Examples: 1000, as EXAMPLES says" in text and "Steps: 8," in text
    _, text = make_plan(MODEL="llama3-8b-base", STAGE="sft", GPUS="8x80", ARGS="--packing=false --max_steps=5")
    assert "Steps: 5," in text


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"GPUS": "8"}, "GPUS=8"),
        ({"NODES": "2"}, "GPUS=8x80"),
        ({"GPUS": "8x80", "EXAMPLES": "all"}, "EXAMPLES='all'"),
        ({"GPUS": "8x80", "TFLOPS": "fast"}, "TFLOPS='fast'"),
        ({"GPUS": "8x80", "SHARDING": "ddp"}, "dtype: bfloat16"),
    ],
)
def test_plan_refuses_what_it_cannot_plan_for(variables, named):
    code, text = make_plan(**variables)
    assert code == 2 and named in text
