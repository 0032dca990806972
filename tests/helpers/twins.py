"""Shrunken twins of the shipped recipes: a small model of the recipe's family, data of its dataset's form, and their runs.

Runs are started, killed at a chosen moment, finished, and compared bit for bit.
"""

import json
import random
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from rmipo.recipe.load import load_recipe
from rmipo.record import read_metrics
from rmipo.training.checkpoints import complete_checkpoints
from tests.helpers.families import save
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, user, write

WORDS = ["alpha", "beta", "gamma", "delta", "margin", "reward", "token", "what", "why", "how", "is", "the", "of", "a"]
WORDS += ["right", "wrong", "answer"]


def dialogue(random_state, prompt):
    answer = " ".join(random_state.choices(WORDS, k=random_state.randint(1, 12)))
    return [user(prompt), assistant(answer)]


def row(form, random_state, number):
    prompt = " ".join(random_state.choices(WORDS, k=random_state.randint(1, 8)))
    first, second = (dialogue(random_state, prompt) for _ in range(2))
    if form == "ultrachat":
        return {"prompt": prompt, "prompt_id": str(number), "messages": first + second}
    pair = {"prompt": prompt, "prompt_id": str(number), "chosen": first, "rejected": second}
    if form == "ultrafeedback_binarized":
        return pair | {"messages": first, "score_chosen": 8.0, "score_rejected": 5.5}
    return pair | {"all_generated_responses": [first[1]["content"]], "all_rm_scores": [0.5]}


def make_twin(folder, recipe, family, form):
    """Write model, tokenizer and data; returns the command-line overrides that point the recipe at them."""
    save(family, folder / "model")
    values = load_recipe(ROOT / "recipes" / f"{recipe}.yaml").values
    random_state = random.Random(0)
    for split, count in (("train", 40), ("test", 3)):
        write(folder / f"data/{split}.jsonl", [row(form, random_state, number) for number in range(count)])
    overrides = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "data", "dataset_num_proc": "null",
        "dtype": "float32", "bf16": "false", "use_cpu": "true", "max_steps": 2, "global_batch_size": 16,
        "per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
        # The first step of a warm-up has learning rate 0; here every step moves the weights.
        "warmup_steps": 0, "learning_rate": 1e-3, "logging_steps": 1,
    }  # fmt: skip
    if recipe.endswith("/rmipo"):
        overrides |= {"generation_samples": 1, "generation_max_new_tokens": 2}
    elif values.get("packing"):
        overrides |= {"max_length": 64}  # so that the packed rows fill two global batches
    return [text for key, value in overrides.items() for text in (f"--{key}", str(value))]


def changed(overrides, **values):
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True))
    flags |= {f"--{key}": value for key, value in values.items()}
    return [str(text) for pair in flags.items() for text in pair]


def run(recipe, overrides, output_dir, sharding=None):
    script = "sft" if recipe.endswith("sft") else "preference"
    command = [f"scripts/{script}.py", "--config", f"recipes/{recipe}.yaml", *overrides]
    run = launch([*command, "--output_dir", str(output_dir)], processes=2 if sharding else 1, sharding=sharding)
    assert run.wait() == 0, run.output[-6000:]
    return [line for line in read_metrics(output_dir) if "loss" in line]


NOT_COMPARED = ("tokens_per_second", "peak_memory_gib", "num_tokens", "eval_num_tokens")  # TRL counts from each start


def start(overrides, output_dir, processes, *more, stage="rmipo", sharding="zero3"):
    script = {"sft": "sft", "rmipo": "preference"}[stage]
    command = ["tests/helpers/fsdp2_on_cpus.py"] if sharding == "fsdp2" else []
    command += [f"scripts/{script}.py", "--config", f"recipes/tiny/{stage}.yaml", *overrides, *more]
    return launch([*command, "--output_dir", str(output_dir)], processes, sharding=sharding if processes > 1 else None)


def finish(overrides, output_dir, processes, *more, stage="rmipo", sharding="zero3"):
    run = start(overrides, output_dir, processes, *more, stage=stage, sharding=sharding)
    assert run.wait() == 0, run.output[-6000:]
    return run.output


def kill_when(run, condition):
    """SIGKILL to the run while `condition()` holds; False if the run ended before.

    The run is frozen first and the condition looked at again, so that the kill is where it should be.
    """
    while run.poll() is None:
        if condition():
            run.send(signal.SIGSTOP)
            if condition():
                run.end()
                return True
            run.send(signal.SIGCONT)
        time.sleep(0.002)
    return False


def comparable_metrics(output_dir):
    return [
        {name: value for name, value in line.items() if name not in NOT_COMPARED and "runtime" not in name
         and not name.endswith("per_second")}
        for line in read_metrics(output_dir)
    ]  # fmt: skip


def assert_same_run(one, other):
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    assert comparable_metrics(one) == comparable_metrics(other)
    if (other / "generations.jsonl").exists():
        assert (one / "generations.jsonl").read_text() == (other / "generations.jsonl").read_text()
    last = complete_checkpoints(other)[-1].name
    files = [path for ending in ("pt", "bin") for path in (other / last).rglob(f"*.{ending}")]
    names = [path.relative_to(other / last) for path in files if path.name != "training_args.bin"]
    assert list((other / last).rglob("*optim*")) and Path("scheduler.pt") in names
    for name in names:  # sharded: each rank's share of weights, masters and moments
        ours, theirs = (torch.load(run / last / name, weights_only=False) for run in (one, other))
        assert_same_values(ours, theirs, str(name))


def assert_same_values(one, other, where):
    if torch.is_tensor(other):
        assert torch.equal(one, other), where
    elif isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in other.keys() - {"ds_version", "ds_config"}:
            assert_same_values(one[key], other[key], f"{where} {key}")
    elif isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same_values(*pair, f"{where} {number}")
    elif isinstance(other, str | int | float | bool):
        assert one == other, where


def last_step(output_dir):
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)
