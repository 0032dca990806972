"""Shrunken twins of the shipped recipes: a small model of the recipe's family, data of its dataset's form, and their runs."""

import random

from rmipo.recipe.load import load_recipe
from rmipo.record import read_metrics
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
