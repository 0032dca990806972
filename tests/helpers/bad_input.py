"""Bad inputs, each given to the program that a user would give it to; tests/test_bad_input.py runs them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from rmipo.recipe.load import load_recipe
from tests.helpers.families import LLAMA3_TEMPLATE, make_tokenizer, save
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.rows import assistant, user

RECIPE, SFT_RECIPE = "recipes/tiny/rmipo.yaml", "recipes/tiny/sft.yaml"


def pair(number, **changes):
    good = {"prompt": [user(f"q{number}")], "chosen": [assistant(f"yes {number}")], "rejected": [assistant("no")]}
    return {name: value for name, value in (good | changes).items() if value is not None}


GOOD = [pair(number) for number in range(12)]


class Bench:
    """A folder with a small model and good data, and the programs, run inside this process."""

    def __init__(self, folder: Path):
        self.folder = folder
        save("llama3", folder / "model")
        self.write("data/train.jsonl", GOOD)
        self.write("data/test.jsonl", GOOD[:3])

    def write(self, name: str, content) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return str(path)

    def train(self, *overrides, recipe=RECIPE, overlay=None, script="preference", env=None) -> str:
        """What scripts/preference.py prints on standard error before it ends with exit code 2."""
        given = {override.partition("=")[0] for override in overrides}
        own = [*self.own(), f"--dataset_name={self.folder / 'data'}"] if recipe == RECIPE else []
        arguments = [flag for flag in own if flag.partition("=")[0] not in given]
        arguments += ["--overlay", overlay] if overlay else []
        return run_program(script, ["--config", recipe, *arguments, *overrides], env or {})

    def own(self) -> tuple[str, str]:
        return f"--model_name_or_path={self.folder / 'model'}", f"--output_dir={self.folder / 'out'}"

    def sft(self, *overrides, **keywords) -> str:
        return self.train(*overrides, script="sft", **keywords)

    def data(self, rows, *overrides, test=None, **keywords) -> str:
        self.write("other/train.jsonl", rows)
        self.write("other/test.jsonl", GOOD[:3] if test is None else test)
        return self.train(f"--dataset_name={self.folder / 'other'}", *overrides, **keywords)

    def template(self, old: str, new: str) -> str:
        assert old in LLAMA3_TEMPLATE
        return self.train(f"--chat_template={self.write('bad.jinja', LLAMA3_TEMPLATE.replace(old, new))}")

    def tokenizer(self, family="llama3", *overrides, **attributes) -> str:
        folder = self.folder / "model-b"
        shutil.copytree(self.folder / "model", folder)
        tokenizer = make_tokenizer(family)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        (folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        return self.train(f"--model_name_or_path={folder}", *overrides)

    def earlier_run(self, place: str, **changes) -> str:
        """The run after one that differed in `changes` has left `place` (run.json, or a checkpoint's marker)."""
        flags = [f"--{key}={value}" for key, value in changes.get("recipe", {}).items()]
        recipe = load_recipe(ROOT / RECIPE, overrides=[*self.own(), f"--dataset_name={self.folder / 'data'}", *flags])
        identity = {
            "recipe": recipe.resolved(),
            "fingerprints": changes.get("fingerprints", {"train": "fc", "test": "fc"}),
            "world_size": changes.get("world_size", 1),
        }
        self.write(f"out/{place}", json.dumps({"finished": False, "step": 4, **identity}))
        return self.train()


def run_program(script: str, arguments: list[str], env: dict[str, str]) -> str:
    """The message with which `scripts/<script>.py` ends; AssertionError unless it ends with one."""
    ended = run_here(script, *arguments, env=env)
    assert ended.code == 2 and "error: " in ended.err, f"{script} ended with {ended.code}: {ended.err[-2000:]}"
    return ended.err.partition("error: ")[2].strip()


@dataclass(frozen=True)
class BadInput:
    area: str
    what: str
    run: Callable[[Bench], str]
    said: tuple[str, ...]  # what was found, what was expected, what to change: each has to be in the message


def recipe_case(override: str, *said: str, **keywords) -> BadInput:
    return BadInput("recipe", f"`{override}`", lambda bench: bench.train(override, **keywords), said)


def row_case(what: str, *said: str, count: int = 1, overrides=(), **changes) -> BadInput:
    rows = [pair(number, **(changes if number < count else {})) for number in range(12)]
    return BadInput("data", what, lambda bench: bench.data(rows, *overrides), said)


def only_train(bench: Bench) -> str:
    folder = Path(bench.write("train-only/train.jsonl", GOOD)).parent
    return bench.train(f"--dataset_name={folder}", "--eval_strategy=epoch")


def dialogues(bench: Bench, *end: dict) -> Path:
    for split in ("train", "test"):
        rows = [{"messages": [user("a"), assistant("b"), user("c"), *end]}] * 12
        path = bench.write(f"dialogues/{split}.jsonl", rows)
    return Path(path).parent


def long_dialogues(bench: Bench, *overrides: str, words: int = 300) -> str:
    for split in ("train", "test"):
        path = bench.write(f"long/{split}.jsonl", [{"messages": [user("a"), assistant("yes " * words)]}] * 12)
    return bench.sft(*bench.own(), f"--dataset_name={Path(path).parent}", *overrides, recipe=SFT_RECIPE)


def added_tokens(bench: Bench) -> str:
    folder = bench.folder / "model-b"
    shutil.copytree(bench.folder / "model", folder)
    tokenizer = make_tokenizer("llama3")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|mine-{number}|>" for number in range(vocabulary - len(tokenizer) + 2)])
    tokenizer.save_pretrained(folder)
    return bench.train(f"--model_name_or_path={folder}")


def without_weights(bench: Bench) -> Path:
    folder = bench.folder / "no-weights"
    shutil.copytree(bench.folder / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def world(bench: Bench, changes: dict) -> str:
    knobs = yaml.safe_load((ROOT / "recipes/tiny/world.yaml").read_text()) | changes
    return run_program("toy", ["--config", bench.write("world.yaml", knobs)], {})


CASES = [
    recipe_case("--metric_for_best_model=accuracy", "metric_for_best_model", "eval_loss"),
    BadInput("recipe", "no such overlay", lambda b: b.train(overlay="none.yaml"), ("none.yaml",)),
    BadInput("recipe", "an SFT recipe for preference.py", lambda b: b.train(recipe=SFT_RECIPE), ("scripts/sft.py",)),
    BadInput("recipe", "a preference recipe for sft.py", lambda b: b.sft(), ("scripts/preference.py",)),
    BadInput("batch", "a global batch that three processes can't divide", lambda b: b.train(env={"WORLD_SIZE": "3"}),
             ("global_batch_size", "(3)")),
    BadInput("device", "a paper setting without a GPU", lambda b: b.train(recipe="recipes/llama3-8b-instruct/rmipo.yaml"),
             ("none is visible", "MODEL=tiny")),
    BadInput("data", "no such file", lambda b: b.train("--dataset_name=x/pairs.jsonl"), ("x/pairs.jsonl",)),
    BadInput("data", "a hub id without a network", lambda b: b.train("--dataset_name=some/pairs"),
             ("some/pairs", "hf auth login")),
    BadInput("data", "a folder without a training file", lambda b: b.train(f"--dataset_name={b.folder / 'model'}"),
             ("'train'",)),
    BadInput("data", "no test split, with evaluation on", only_train, ("'test'", "eval_strategy: no")),
    BadInput("data", "one file too small to divide",
             lambda b: b.train(f"--dataset_name={b.write('few.jsonl', GOOD[:3])}"), ("3 rows", "test_split_size")),
    BadInput("data", "broken JSON", lambda b: b.data('{"prompt": \n'), ("train.jsonl",)),
    BadInput("data", "no rows", lambda b: b.data(""), ("train.jsonl can't be read: it has no rows",)),
    BadInput("data", "misnamed columns", lambda b: b.data([{"prompt": "a", "good": "b", "bad": "c"}] * 12),
             ("row 0: there is no chosen", "found the columns prompt, good, bad")),
    BadInput("data", "SFT dialogues that end with the user",
             lambda b: b.sft(*b.own(), f"--dataset_name={dialogues(b)}", recipe=SFT_RECIPE),
             ("train: 12 of 12 rows", "max_dropped_fraction")),
    BadInput("data", "`--completion_only_loss` of dialogues",
             lambda b: b.sft(*b.own(), f"--dataset_name={dialogues(b, assistant('yes'))}", "--completion_only_loss",
                             recipe=SFT_RECIPE), ("completion_only_loss", "12 of 12 rows")),
    row_case("responses without a prompt", "row 0: there is no prompt", prompt=None, count=12),
    row_case("tools in a column", "`tools`", "row 0", tools=[{"name": "search"}]),
    row_case("reasoning apart from the content", "`chosen` has messages with reasoning_content",
             chosen=[{**assistant("a"), "reasoning_content": "hm"}], count=12),
    row_case("an unknown role", "'human'", "row 0", prompt=[{"role": "human", "content": "a"}]),
    row_case("empty responses", "train: 1 of 12 rows", "max_dropped_fraction: 0.02", "chosen is empty: row 0",
             chosen=[assistant(" ")]),
    BadInput("data", "empty responses in the test split",
             lambda b: b.data(GOOD, test=[pair(0, chosen=[assistant(" ")]), *GOOD[1:4]]),
             ("test: 1 of 4 rows", "chosen is empty: row 0")),
    row_case("responses that are mostly cut", "12 of 12 rows", "max_truncated_fraction: 0.5", "max_length",
             chosen=[assistant("yes " * 300)], count=12, overrides=("--max_truncated_fraction=0.5",)),
    BadInput("data", "SFT dialogues that are mostly cut", lambda b: long_dialogues(b, "--max_truncated_fraction=0.5"),
             ("train: 12 of 12 rows", "max_truncated_fraction: 0.5")),
    BadInput("template", "none", lambda b: b.tokenizer(chat_template=None), ("chat template", "`chat_template`")),
    BadInput("template", "no end token", lambda b: b.template(" + '<|eot_id|>'", ""), ("no end token",)),
    BadInput("template", "prior_context: bos without a BOS token",
             lambda b: b.tokenizer("qwen3", "--objective.prior_context=bos"), ("prior_context",)),
    BadInput("model", "no such folder", lambda b: b.train("--model_name_or_path=outputs/mine/sft"),
             ("outputs/mine/sft",)),
    BadInput("model", "a hub id without a network", lambda b: b.train("--model_name_or_path=some/model"),
             ("some/model", "HF_HUB_OFFLINE")),
    BadInput("model", "a tokenizer with more tokens than embeddings", added_tokens, ("2 tokens more",)),
    BadInput("model", "sequences longer than its positions", lambda b: b.train("--max_length=1000000"), ("max_length",)),
    BadInput("model", "dialogues longer than its positions, in SFT that cuts none",
             lambda b: long_dialogues(b, "--max_length=null", words=3000), ("max_length", "2048")),
    BadInput("model", "several chat templates, none of them the default",
             lambda b: b.tokenizer(chat_template={"chat": LLAMA3_TEMPLATE, "tool_use": LLAMA3_TEMPLATE}),
             ("tool_use", "chat_template")),
    BadInput("model", "a folder without weights", lambda b: b.train(f"--model_name_or_path={without_weights(b)}"),
             ("model.safetensors",)),
    BadInput("checkpoint", "the folder of a run with another objective",
             lambda b: b.earlier_run("run.json", recipe={"objective.beta": "2.5"}), ("recipe.objective.beta: 2.5, now 2.0",)),
    BadInput("checkpoint", "a checkpoint of other data",
             lambda b: b.earlier_run("checkpoint-4/complete.json", fingerprints={"train": "x", "test": "x"}),
             ("checkpoint-4", "fingerprints.train: x, now")),
    BadInput("checkpoint", "a checkpoint of eight processes",
             lambda b: b.earlier_run("checkpoint-4/complete.json", world_size=8), ("world_size: 8, now 1",)),
    BadInput("checkpoint", "an output folder with other files in it", lambda b: b.train(f"--output_dir={b.folder / 'model'}"),
             ("--output_dir", "chat_template.jinja")),
    BadInput("online", "`make online ROUNDS=some`", lambda _: run_program("online", [], {"ROUNDS": "some"}), ("ROUNDS",)),
    BadInput("world", "a share above 1", lambda b: world(b, {"label_noise": 2}), ("label_noise",)),
]  # fmt: skip
