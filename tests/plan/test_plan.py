"""`make plan`: what it prints, suggests and refuses."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.twins import make_twin


def make_plan(**variables):
    ended = run_here("plan", env={"MODEL": "llama3-8b-instruct", **variables})
    return ended.code, ended.out + ended.err


def test_plan_prints_every_part():
    code, text = make_plan(GPUS="8x80")
    assert code == 0
    for part in (
        "parameters",
        "gradients and optimizer",
        "gathered",
        "activations",
        "LM head",
        "without gradient",
        "Disk",
    ):
        assert part in text
    assert "of 80: fits" in text and "8 GPUs in sequences of at most 8192 tokens" in text
    largest = int(text.partition("as the recipe is: max_tokens_per_micro_batch: ")[2].split()[0])
    assert largest >= 8192 and largest % 4096 == 0
    # 61135 pairs, 128 at a time
    assert "Steps: 478" in text and "matrix products at 35% to 50% of 312 TFLOP/s" in text
    hours = re.search(r"^Hours: (\S+) to (\S+), .*GPU hours$", text, re.MULTILINE)
    assert 0.5 < float(hours[1]) < float(hours[2]) < 2
    # Eight A100 at 35% to 50% of their peak, and about 3.5 forwards of 2 x 8e9 FLOPs a token.
    speed = re.search(r"^Tokens per second: (\d+) to (\d+) in training steps$", text, re.MULTILINE)
    assert [int(each) for each in speed.groups()] == pytest.approx([15600, 22300], rel=0.15)
    for phase in ("training", "evaluation", "sample generations", "saving"):
        assert re.search(rf"^  {phase} +\d", text, re.MULTILINE), phase
    assert "reference pass" not in text
    assert "  reference pass " in make_plan(GPUS="8x80", METHOD="dpo")[1]


def test_plan_of_a_cpu_setting_speaks_of_the_cpu(tmp_path):
    make_rows = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    code, text = make_plan(MODEL="tiny", ARGS=shlex.join(make_rows))
    assert code == 0 and "This machine's CPU with" in text and "= CPU x" in text
    assert "GPU" not in text.replace("Hours: not estimated for a CPU", "") and "all logits at once" in text


def test_plan_fails_when_the_run_cannot_fit():
    code, text = make_plan(GPUS="4x24", METHOD="dpo")
    assert (
        code == 1 and "DOES NOT FIT" in text and "per_device" not in text and "max_tokens_per_micro_batch: none" in text
    )
    assert "without gradient" not in text
    assert "error: GPUS='eight': expected" in make_plan(GPUS="eight")[1]
    assert "error: TFLOPS=fast: expected a number above 0" in make_plan(GPUS="8x80", TFLOPS="fast")[1]
    ddp = make_plan(GPUS="8x80", SHARDING="ddp")[1]
    assert "dtype: bfloat16 trains all weights without a float32" in ddp


def test_plan_follows_the_length_that_the_recipe_asks_for():
    base = {"MODEL": "llama3-8b-base", "GPUS": "8x80"}
    _, text = make_plan(**base, ARGS="--max_steps=100")
    assert "Steps: 100," in text and "Tokens: 11 M" in text  # 100 x 128 pairs of 860 tokens
    _, text = make_plan(**base, ARGS="--max_train_samples=1280")
    assert "Examples: 1280, in the training data" in text and "Steps: 10," in text
    _, text = make_plan(MODEL="llama3-8b-instruct-hh-helpful", GPUS="8x80")
    assert "Examples: 43835, in the training data" in text and "Steps: 343," in text
    _, text = make_plan(GPUS="8x80")
    assert "Examples: 61135, assumed; EXAMPLES= says otherwise" in text
    _, text = make_plan(GPUS="8x80", EXAMPLES="1000")
    assert "Examples: 1000, as EXAMPLES says" in text and "Steps: 8," in text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GPUS": "8x80", "SHARDING": "zero9"}, "error: SHARDING='zero9' is unknown. Files in configs/acc"),
        ({"GPUS": "8x80", "NODES": "1.5"}, "error: NODES='1.5': expected the number of machines"),
        ({"GPUS": "8x80", "STAGE": "all"}, "error: STAGE='all' is unknown. The stages of llama3-8b-instruct:\n  rmipo"),
        ({"NODES": "2"}, "error: NODES=2: name the GPUs of each and the GiB of one too, e.g. GPUS=8x80"),
    ],
)
def test_plan_refuses_what_it_cannot_plan_for(variables, message):
    assert make_plan(**variables)[1].startswith(message)


def test_args_of_the_sft_stage_are_no_mistake_in_the_other():
    _, text = make_plan(MODEL="llama3-8b-base", STAGE="sft", GPUS="8x80", ARGS="--packing=false --max_steps=5")
    assert "Steps: 5," in text


def test_plan_says_which_stage_comes_first_and_nothing_else():
    """In a fresh process: warnings of libraries come with their import."""
    environment = os.environ | {"MODEL": "tiny", "DATA": "never-trained.jsonl"}
    for name in ("DS_ACCELERATOR", "STAGE", "METHOD", "ARGS", "GPUS", "NODES", "WANDB_MODE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "scripts/plan.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: model_name_or_path: outputs/tiny/sft-never-trained is made by an earlier stage. Run it first: make train "
        "MODEL=tiny STAGE=sft DATA=never-trained.jsonl\n",
    )


@pytest.mark.parametrize(("nodes", "said"), [("8", "43% to 48%"), ("4", "8% to 11%"), ("1", None)])
def test_plan_says_what_many_gpus_wait_for(nodes, said):
    """128 pairs on 64, 32 and 8 GPUs."""
    _, text = make_plan(GPUS="8x80", NODES=nodes)
    assert ("is waiting" in text) == (said is not None) and (said or "") in text
    if said:
        assert f"global_batch_size: {int(nodes) * 64}" in text
