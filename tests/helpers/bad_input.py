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
        flags = {
            "--model_name_or_path": str(self.folder / "model"),
            "--dataset_name": str(self.folder / "data"),
            "--output_dir": str(self.folder / "out"),
        }
        given = {override.partition("=")[0] for override in overrides}
        if "--datasets" in given:
            flags.pop("--dataset_name")
        arguments = [f"{key}={value}" for key, value in flags.items() if key not in given and recipe == RECIPE]
        arguments += ["--overlay", overlay] if overlay else []
        return run_program(script, ["--config", recipe, *arguments, *overrides], env or {})

    def sft(self, *overrides, **keywords) -> str:
        return self.train(*overrides, script="sft", **keywords)

    def data(self, rows, *overrides, test=None, **keywords) -> str:
        """The run on these training rows (a list, or the text of the file)."""
        self.write("other/train.jsonl", rows)
        self.write("other/test.jsonl", GOOD[:3] if test is None else test)
        return self.train(f"--dataset_name={self.folder / 'other'}", *overrides, **keywords)

    def template(self, old: str, new: str) -> str:
        assert old in LLAMA3_TEMPLATE
        return self.train(f"--chat_template={self.write('bad.jinja', LLAMA3_TEMPLATE.replace(old, new))}")

    def tokenizer(self, family="llama3", *overrides, **attributes) -> str:
        """The run of a model whose tokenizer has these attributes."""
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

    def launch(self, script="launch", **env) -> str:
        return run_program(script, [], env)

    def earlier_run(self, place: str, **changes) -> str:
        """The run after one that differed in `changes` has left `place` (run.json, or a checkpoint's marker)."""
        flags = [f"--{key}={value}" for key, value in changes.get("recipe", {}).items()]
        recipe = load_recipe(
            ROOT / RECIPE,
            overrides=[
                f"--model_name_or_path={self.folder / 'model'}",
                f"--dataset_name={self.folder / 'data'}",
                f"--output_dir={self.folder / 'out'}",
                *flags,
            ],
        )
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


def file_case(what: str, content, *said: str) -> BadInput:
    return BadInput("recipe", what, lambda bench: bench.train(recipe=bench.write("mine/rmipo.yaml", content)), said)


def launch_case(what: str, *said: str, area: str = "launch", script: str = "launch", **env: str) -> BadInput:
    return BadInput(area, what, lambda bench: bench.launch(script, **env), said)


def only_train(bench: Bench) -> str:
    folder = Path(bench.write("train-only/train.jsonl", GOOD)).parent
    return bench.train(f"--dataset_name={folder}", "--eval_strategy=epoch")


def dialogues(bench: Bench, *end: dict) -> Path:
    for split in ("train", "test"):
        path = bench.write(
            f"dialogues/{split}.jsonl", [{"messages": [user("a"), assistant("b"), user("c"), *end]}] * 12
        )
    return Path(path).parent


def long_dialogues(bench: Bench, *overrides: str, words: int = 300) -> str:
    for split in ("train", "test"):
        path = bench.write(f"long/{split}.jsonl", [{"messages": [user("a"), assistant("yes " * words)]}] * 12)
    return bench.sft(
        f"--model_name_or_path={bench.folder / 'model'}",
        f"--dataset_name={Path(path).parent}",
        f"--output_dir={bench.folder / 'out'}",
        *overrides,
        recipe=SFT_RECIPE,
    )


def added_tokens(bench: Bench, script: str) -> str:
    folder = bench.folder / "model-b"
    shutil.copytree(bench.folder / "model", folder)
    tokenizer = make_tokenizer("llama3")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|mine-{number}|>" for number in range(vocabulary - len(tokenizer) + 2)])
    tokenizer.save_pretrained(folder)
    data = (
        [] if script == "preference" else [f"--dataset_name={dialogues(bench)}", f"--output_dir={bench.folder / 'out'}"]
    )
    recipe = RECIPE if script == "preference" else SFT_RECIPE
    return bench.train(f"--model_name_or_path={folder}", *data, recipe=recipe, script=script)


def empty(bench: Bench) -> Path:
    (bench.folder / "empty").mkdir()
    return bench.folder / "empty"


def without_weights(bench: Bench) -> Path:
    folder = bench.folder / "no-weights"
    shutil.copytree(bench.folder / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def generation_config(bench: Bench, text: str) -> str:
    shutil.copytree(bench.folder / "model", bench.folder / "model-b")
    bench.write("model-b/generation_config.json", text)
    return bench.train(f"--model_name_or_path={bench.folder / 'model-b'}")


def world(bench: Bench, changes: dict) -> str:
    knobs = yaml.safe_load((ROOT / "recipes/tiny/world.yaml").read_text()) | changes
    return run_program("toy", ["--config", bench.write("world.yaml", knobs)], {})


HANDBOOK = yaml.safe_load((ROOT / "tests/recipe/foreign/dpo_mixture.yaml").read_text())

CASES = [
    recipe_case("--metric_for_best_model=accuracy", "metric_for_best_model", "eval_loss"),
    recipe_case("--accelerator_config=none.json", "none.json"),
    BadInput("recipe", "no such overlay", lambda b: b.train(overlay="none.yaml"), ("none.yaml",)),
    BadInput("recipe", "an SFT recipe for preference.py", lambda b: b.train(recipe=SFT_RECIPE), ("scripts/sft.py",)),
    BadInput("recipe", "a preference recipe for sft.py", lambda b: b.sft(), ("scripts/preference.py",)),
    file_case("handbook: no loss_type, as ORPO's and KTO's recipes have none",
              {key: value for key, value in HANDBOOK.items() if key != "loss_type"}, "loss_type", "objective: {name: dpo"),
    BadInput(
        "batch",
        "a global batch that three processes can't divide",
        lambda b: b.train(env={"WORLD_SIZE": "3"}),
        ("global_batch_size", "processes (3)"),
    ),
    BadInput(
        "device",
        "a paper setting without a GPU",
        lambda b: b.train(recipe="recipes/llama3-8b-instruct/rmipo.yaml"),
        ("none is visible", "MODEL=tiny trains on a CPU", "DRY=1"),
    ),
    BadInput("data", "no such file", lambda b: b.train("--dataset_name=x/pairs.jsonl"), ("no such file or folder",)),
    BadInput(
        "data",
        "a hub id without a network",
        lambda b: b.train("--dataset_name=some/pairs"),
        ("some/pairs: the dataset can't be reached", "hf auth login", "give that folder instead"),
    ),
    BadInput(
        "data",
        "a folder without a training file",
        lambda b: b.train(f"--dataset_name={b.folder / 'model'}"),
        ("no file of the train split 'train'", "Found: ", "Rename a file, or set"),
    ),
    BadInput(
        "data",
        "no test split, with evaluation on",
        only_train,
        ("no file of the test split 'test'", "Or train without evaluation: eval_strategy: no"),
    ),
    BadInput(
        "data",
        "a file of another kind",
        lambda b: b.train(f"--dataset_name={b.write('pairs.txt', 'a')}"),
        ("a data file ends in one of .jsonl",),
    ),
    BadInput(
        "data",
        "one file too small to divide",
        lambda b: b.train(f"--dataset_name={b.write('few.jsonl', GOOD[:3])}"),
        ("3 rows are too few to set some aside", "test_split_size"),
    ),
    BadInput("data", "broken JSON", lambda b: b.data('{"prompt": \n'), ("train.jsonl can't be read as json",)),
    BadInput("data", "no rows", lambda b: b.data(""), ("train.jsonl has no rows",)),
    BadInput(
        "data",
        "misnamed columns",
        lambda b: b.data([{"prompt": "a", "good": "b", "bad": "c"}] * 12),
        ("missing columns chosen, rejected", "found prompt, good, bad", "Rename the columns"),
    ),
    BadInput(
        "data",
        "dialogues in place of pairs",
        lambda b: b.data([{"messages": [user("a"), assistant("b")]}] * 12),
        ("missing columns chosen, rejected", "found messages", "Accepted formats"),
    ),
    BadInput(
        "data",
        "pairs for SFT",
        lambda b: b.sft(
            f"--model_name_or_path={b.folder / 'model'}",
            f"--dataset_name={b.folder / 'data'}",
            recipe=SFT_RECIPE,
        ),
        ("missing columns messages", "found prompt, chosen, rejected", "Accepted formats"),
    ),
    BadInput(
        "data",
        "SFT dialogues that end with the user",
        lambda b: b.sft(
            f"--model_name_or_path={b.folder / 'model'}",
            f"--dataset_name={dialogues(b)}",
            recipe=SFT_RECIPE,
        ),
        ("train: 12 of 12 rows can't be used", "does not end with an assistant message", "max_dropped_fraction"),
    ),
    BadInput(
        "data",
        "`--completion_only_loss` of dialogues",
        lambda b: b.sft(
            f"--model_name_or_path={b.folder / 'model'}",
            f"--dataset_name={dialogues(b, assistant('yes'))}",
            f"--output_dir={b.folder / 'out'}",
            "--completion_only_loss",
            recipe=SFT_RECIPE,
        ),
        ("completion_only_loss is true", "12 of 12 rows are dialogues", "prompt and completion", "assistant_only_loss"),
    ),
    row_case("responses without a prompt", "no prompt", "rows 0, 1, 2, 3, 4 and 7 more", prompt=None, count=12),
    row_case("tools in a column", "`tools` is part of the prompt, but is not supported: remove the column", "row 0",
             tools=[{"name": "search"}]),
    row_case("a system prompt in a column of another name", "`system_prompt` is part of the prompt", "row 0",
             system_prompt="Be brief"),
    row_case("a prompt that is not the one of the dialogues", "`prompt` differs from the turns that `chosen` and", "row 0",
             prompt=[{"role": "system", "content": "Be brief"}, user("a")], chosen=[user("a"), assistant("b")],
             rejected=[user("a"), assistant("c")]),
    row_case("arguments of the template in a column", "`chat_template_kwargs` is part of the prompt",
             chat_template_kwargs={"enable_thinking": False}, count=12),
    row_case("calls of tools in messages", "`prompt` has messages with tool_calls, which are not supported",
             "put them into content",
             prompt=[{**user("a"), "tool_calls": [{"name": "f"}]}], count=12),
    row_case("reasoning apart from the content", "`chosen` has messages with reasoning_content, which are not supported",
             chosen=[{**assistant("a"), "reasoning_content": "hm"}], count=12),
    row_case("two system messages", "`system` differs from the system message of the row", system="Be brief",
             prompt=[{"role": "system", "content": "Be long"}, user("a")], count=12),
    BadInput("data", "a lone surrogate, in a column of mixed types",
             lambda b: b.data('{"prompt": "a", "chosen": "b\\udc00", "rejected": "c"}\n'
                              '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}\n'),
             ("train.jsonl can't be read as json", "surrogate")),
    BadInput("data", "a slice of a local split",
             lambda b: b.train(f"--dataset_name={b.folder / 'data'}", "--dataset_train_split=train[:5]"),
             ("its split 'train[:5]' can't be a slice", "set max_train_samples")),
    BadInput("data", "a test split larger than the data",
             lambda b: b.train(f"--dataset_name={b.folder / 'data'}", "--test_split_size=12"),
             ("test_split_size is 12: 12 rows can't be divided",)),
    BadInput("data", "a test split that leaves nothing to train on",
             lambda b: b.train(f"--dataset_name={b.folder / 'data'}", "--test_split_size=0.999"),
             ("test_split_size is 0.999: 12 rows can't be divided",)),
    BadInput("data", "a weight too small to take a row",
             lambda b: b.train(f"--datasets=[{{path: {b.folder / 'data'}, weight: 0.001}}]"),
             ("weight 0.001 takes none of its 12 rows", "Raise it")),
    BadInput("data", "SFT dialogues that are mostly cut",
             lambda b: long_dialogues(b, "--max_truncated_fraction=0.5"),
             ("train: 12 of 12 rows are cut, more than max_truncated_fraction: 0.5", "Raise max_length (128)")),
    row_case("an unknown role", "the role 'human'", "expected system, user, assistant", "row 0",
             prompt=[{"role": "human", "content": "a"}]),
    row_case("messages with other keys", "expected messages with role and content", "rows 0, 1",
             chosen=[{"from": "gpt", "value": "a"}], count=12),
    row_case("numbers for text", "`chosen` has content of type int, expected text",
             chosen=[{"role": "assistant", "content": 5}], count=12),
    row_case("empty responses", "train: 1 of 12 rows can't be used", "max_dropped_fraction: 0.02", "chosen is empty: row 0",
             chosen=[assistant(" ")]),
    BadInput("data", "empty responses in the test split",
             lambda b: b.data(GOOD, test=[pair(0, chosen=[assistant(" ")]), *GOOD[1:4]]),
             ("test: 1 of 4 rows can't be used", "chosen is empty: row 0")),
    BadInput("data", "numbers for text in the test split",
             lambda b: b.data(GOOD, test=[pair(0, chosen=[{"role": "assistant", "content": 5}])] * 4),
             ("test: ", "rows that can't be read", "content of type int")),
    row_case("identical responses", "chosen and rejected are identical: row 0", chosen=[assistant("no")]),
    row_case("roles out of order", "roles out of order: user after user: rows 0, 1",
             prompt=[user("a"), user("b")], count=2),
    row_case("a prompt that leaves room for one token", "chosen and rejected are identical after the cut: row 0",
             prompt=[user("why " * 300)], chosen=[assistant("no 1")],
             overrides=("--max_prompt_length=127", "--max_length=128")),
    row_case("the end token in a response", "the text of chosen contains an end token: row 0",
             chosen=[assistant("yes<|eot_id|>no")]),
    row_case("responses that are mostly cut", "12 of 12 rows are cut, more than max_truncated_fraction: 0.5",
             "Raise max_length (128)", chosen=[assistant("yes " * 300)], count=12,
             overrides=("--max_truncated_fraction=0.5",)),
    BadInput("template", "none", lambda b: b.tokenizer(chat_template=None),
             ("the tokenizer has no chat template", "Set `chat_template` in the recipe")),
    BadInput("template", "two BOS tokens", lambda b: b.template("{{ bos_token }}", "{{ bos_token + bos_token }}"),
             ("double BOS", "twice", "write it once")),
    BadInput("template", "no end token", lambda b: b.template(" + '<|eot_id|>'", ""),
             ("no end token: after a response the template writes ''", "write {{ eos_token }}")),
    BadInput("template", "two end tokens", lambda b: b.template(" + '<|eot_id|>'", " + '<|eot_id|><|eot_id|>'"),
             ("doubled end token", "write <|eot_id|> once")),
    BadInput("template", "a response twice", lambda b: b.template(" + '<|eot_id|>'", " + message['content'] + '<|eot_id|>'"),
             ("more than once", "write its content once")),
    BadInput("template", "text after the end token", lambda b: b.template(" + '<|eot_id|>'", " + '<|eot_id|>bye'"),
             ("writes 'bye' after the end token", "end a response there")),
    BadInput("template", "a prompt that is not a prefix of the full text",
             lambda b: b.template("assistant<|end_header_id|>", "bot<|end_header_id|>"),
             ("the prompt is not a prefix of the full text", "change the template")),
    BadInput("template", "refuses a dialogue",
             lambda b: b.template("{% for message in messages %}", "{{ raise_exception('no') }}{% for message in messages %}"),
             ("the chat template refuses: no",)),
    BadInput("template", "neither pad nor end of text", lambda b: b.tokenizer(eos_token=None),
             ("neither a pad token nor an EOS token", "set one: tokenizer.pad_token")),
    BadInput("template", "a BOS token that nothing writes", lambda b: b.tokenizer("qwen3", bos_token="<think>"),
             ("no BOS: neither the template nor the tokenizer writes <think>", "start the template with {{ bos_token }}")),
    BadInput("template", "prior_context: bos without a BOS token",
             lambda b: b.tokenizer("qwen3", "--objective.prior_context=bos"),
             ("prior_context: bos leaves nothing in front of a response", "header or none")),
    BadInput("model", "no such folder", lambda b: b.train("--model_name_or_path=outputs/mine/sft"),
             ("model_name_or_path is outputs/mine/sft: no such folder", "Has its stage been run?")),
    BadInput("model", "a hub id without a network", lambda b: b.train("--model_name_or_path=some/model"),
             ("the tokenizer of some/model can't be loaded", "HF_HUB_OFFLINE", "`.venv/bin/hf auth login`")),
    BadInput("model", "a tokenizer with more tokens than embeddings", lambda b: added_tokens(b, "preference"),
             ("its tokenizer has 2 tokens more than the model has embeddings", "Remove them, or enlarge the model")),
    BadInput("model", "the same in SFT", lambda b: added_tokens(b, "sft"),
             ("its tokenizer has 2 tokens more than the model has embeddings", "Remove them, or enlarge the model")),
    BadInput("model", "sequences longer than its positions", lambda b: b.train("--max_length=1000000"),
             ("max_length is 1000000", "set max_length to")),
    BadInput("model", "dialogues longer than its positions, in SFT that cuts none",
             lambda b: long_dialogues(b, "--max_length=null", words=3000),
             ("the length of the longest dialogue (max_length: null) is ", "set max_length to 2048 or less")),
    BadInput("model", "several chat templates, none of them the default",
             lambda b: b.tokenizer(chat_template={"chat": LLAMA3_TEMPLATE, "tool_use": LLAMA3_TEMPLATE}),
             ("several chat templates, chat, tool_use, and none is named default", "Set chat_template")),
    BadInput("model", "an empty folder", lambda b: b.train(f"--model_name_or_path={empty(b)}"),
             ("the tokenizer of", "can't be loaded", "Check the name or folder")),
    BadInput("model", "a generation_config.json that is no JSON", lambda b: generation_config(b, '{"eos_token_id": '),
             ("generation_config.json can't be used (Expecting value", "Correct the file, or remove it")),
    BadInput("model", "a watermarking_config without a block",
             lambda b: generation_config(b, '{"watermarking_config": 3}'),
             ("generation_config.json can't be used ('int' object", "what transformers' GenerationConfig takes")),
    BadInput("model", "a folder without weights", lambda b: b.train(f"--model_name_or_path={without_weights(b)}"),
             ("the model of", "no file named model.safetensors", "Weights have to be safetensors")),
    BadInput("checkpoint", "the folder of a run with another learning rate",
             lambda b: b.earlier_run("run.json", recipe={"learning_rate": "1e-6"}),
             ("belongs to another run", "recipe.learning_rate: 1e-06, now ", "Name another --output_dir")),
    BadInput("checkpoint", "the folder of a run with another objective",
             lambda b: b.earlier_run("run.json", recipe={"objective.beta": "2.5"}),
             ("recipe.objective.beta: 2.5, now 2.0", "or remove it")),
    BadInput("checkpoint", "a checkpoint of other data",
             lambda b: b.earlier_run("checkpoint-4/complete.json", fingerprints={"train": "x", "test": "x"}),
             ("checkpoint-4 belongs to another run", "fingerprints.train: x, now")),
    BadInput("checkpoint", "a checkpoint of eight processes",
             lambda b: b.earlier_run("checkpoint-4/complete.json", world_size=8), ("world_size: 8, now 1",)),
    BadInput("checkpoint", "an output folder with other files in it",
             lambda b: b.train(f"--output_dir={b.folder / 'model'}"),
             ("is not empty and has no run.json", "Found: chat_template.jinja", "name another --output_dir")),
    launch_case("`make online ROUNDS=some`", "ROUNDS='some'", area="online", script="online", ROUNDS="some"),
    BadInput("world", "no such file", lambda _: run_program("toy", ["--config", "none.yaml"], {}),
             ("none.yaml",)),
    BadInput("world", "a share above 1", lambda b: world(b, {"label_noise": 2}), ("label_noise is 2", "expected 0 to 1")),
]  # fmt: skip
