"""Pairs: their accepted formats, real data; unusable rows and their reasons, cutting, the report."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

from rmipo.data import formats
from rmipo.data.chat import ChatFormat, DataError
from rmipo.data.formats import DataReport
from rmipo.data.pairs import LIMITS, cut_pair, load_pairs, tokenize_pairs
from rmipo.evaluation import BENCHMARKS
from rmipo.recipe.schema import DataConfig, PairConfig
from tests.helpers.families import LLAMA3_TEMPLATE, make_tokenizer
from tests.helpers.rows import assistant, config, pair, pairs, tokenize, user, write

UNUSABLE = {
    "chosen is empty": {"chosen": [assistant(" \n")]},
    "rejected is empty": {"rejected": [assistant("")]},
    "chosen and rejected are identical": {"rejected": [assistant("Right 0 ")]},
    "chosen is not one assistant message after the prompt": {"chosen": [assistant("a"), assistant("b")]},
    "rejected is not one assistant message after the prompt": {"rejected": [user("a")]},
    "the prompt is empty": {"prompt": []},
    "the prompt has an empty message": {"prompt": [user("a"), assistant(" \n"), user("c")]},
    "roles out of order": {"prompt": [user("a"), assistant("b")]},
    "the text of chosen contains an end token": {"chosen": [assistant("a<|eot_id|>b")]},
    "the text of rejected contains an end token": {"rejected": [assistant("a<|eot_id|>b")]},
    "the prompt's text has a BOS token in it": {"prompt": [user("<|begin_of_text|>")]},
}


def test_unusable_rows_are_counted_with_their_reasons():
    rows = [pair(0), *({**pair(0), **bad} for bad in UNUSABLE.values()), pair(0)]
    tokenized, report = tokenize([{**row, "row": 100 - i} for i, row in enumerate(rows)])
    assert report.dropped == {reason: [100 - i] for i, reason in enumerate(UNUSABLE, start=1)}
    last = len(UNUSABLE) + 1
    assert tokenized["row"][:] == [100, 100 - last]
    assert (report.rows, report.kept) == (last + 1, 2)
    assert json.loads(json.dumps(vars(report)))["kept"] == 2
    assert "- 1 dropped, chosen is empty: row 99" in report.lines()
    rows = [*pairs(*range(8)), pair(8, chosen=[assistant("")]), pair(9, chosen=[assistant("")])]
    assert tokenize(rows, max_dropped_fraction=0.2)[1].kept == 8
    with pytest.raises(DataError, match=r"(?s)2 of 10 rows .* max_dropped_fraction: 0\.19 .*row 8, 9"):
        tokenize(rows, max_dropped_fraction=0.19)


def test_what_a_template_refuses_or_changes_is_dropped():
    changes = "{% if messages[-1]['content'] == 'Wrong 1' %}{{ 'Be brief' }}{% endif %}"
    _, report = tokenize(pairs(0, 1, 2), make_tokenizer("llama3", changes + LLAMA3_TEMPLATE))
    assert report.dropped == {"the chat template changes the prompt when a response follows": [1]}
    rows = [pair(0), pair(1, prompt=[{"role": "system", "content": "Be brief"}, user("a")])]
    _, report = tokenize(rows, "gemma")
    assert report.dropped == {"the chat template refuses: System role not supported": [1]}


TURNS = [user("a " * 20), assistant("b"), user("c")]


@pytest.mark.parametrize(
    ("family", "bos_token", "bos_id"),
    [
        ("qwen3", None, None),
        ("qwen3", "<|im_start|>", None),  # starts each turn
        ("llama3", "<|begin_of_text|>", 0),
        ("llama3", "<|eot_id|>", 4),  # also ends each turn
        ("mistral-instruct", "<s>", 1),
    ],
)
def test_whole_and_cut_prompts_with_the_families_kinds_of_bos(family, bos_token, bos_id):
    tokenizer = make_tokenizer(family)
    tokenizer.bos_token = bos_token
    whole = ChatFormat.probe(tokenizer).prompt_ids(TURNS)
    tokenized, report = tokenize([pair(0, prompt=TURNS)], tokenizer)
    assert (tokenized["prompt_ids"][0], report.dropped) == (whole, {})
    assert whole[-15] != bos_id
    cut = tokenize([pair(0, prompt=TURNS)], tokenizer, max_prompt_length=15)[0]["prompt_ids"][0]
    assert cut == (whole[-15:] if bos_id is None else [bos_id, *whole[-14:]])


def test_cut_by_hand():
    prompt, chosen, rejected = [1, 11, 12, 13, 14], [21, 22, 23, 2], [31, 2]
    whole = (prompt, chosen, rejected)
    assert cut_pair(whole, 1, max_length=9, max_prompt_length=5) == whole
    assert cut_pair(whole, 1, max_length=8, max_prompt_length=5) == (prompt, [21, 22, 23], rejected)
    assert cut_pair(whole, 1, max_length=6, max_prompt_length=5) == (prompt, [21], [31])
    # The prompt keeps its end behind BOS; what it loses is room for the responses.
    assert cut_pair(whole, 1, max_length=7, max_prompt_length=3) == ([1, 13, 14], chosen, rejected)
    assert cut_pair(whole, None, max_length=7, max_prompt_length=3) == ([12, 13, 14], chosen, rejected)
    assert cut_pair(whole, 1, max_length=5, max_prompt_length=5) == (prompt, [], [])
    assert cut_pair(whole, 1, max_length=7, max_prompt_length=1) == ([1], chosen, rejected)


def test_cuts_are_counted_and_limited():
    rows = [
        pair(0),
        pair(1, prompt=[user("long " * 40)]),
        pair(2, chosen=[assistant("longer " * 80)]),
        pair(3, prompt=[user("long " * 40)], chosen=[assistant("longer " * 80)], rejected=[assistant("and " * 99)]),
        pair(4, chosen=[assistant("longer " * 80)]),
    ]
    whole, nothing_cut = tokenize(rows, max_length=2000, max_prompt_length=1000)
    assert nothing_cut.rows_cut == 0
    cut, report = tokenize(rows, max_length=90, max_prompt_length=60)
    assert (report.cut, report.rows_cut) == ({"prompt": 2, "chosen": 3, "rejected": 1}, 4)
    for long, short in zip(whole, cut, strict=True):
        assert short["prompt_ids"] == ([0, *long["prompt_ids"][-59:]] if long["row"] in (1, 3) else long["prompt_ids"])
        for side in ("chosen_ids", "rejected_ids"):
            assert short[side] == long[side][: 90 - len(short["prompt_ids"])]
    with pytest.raises(DataError, match=r"4 of 5 rows .*max_truncated_fraction: 0\.7 "):
        tokenize(rows, max_length=90, max_prompt_length=60, max_truncated_fraction=0.7)


def test_what_a_cut_leaves_may_be_no_pair():
    _, report = tokenize([pair(0), pair(1, prompt=[user("long " * 99)])], max_length=90, max_prompt_length=90)
    assert report.dropped == {"the prompt fills the window": [1]}
    same = "the same words " * 30
    rows = [pair(0), pair(1, chosen=[assistant(same + "yes")], rejected=[assistant(same + "no")])]
    whole = tokenize(rows, max_length=2000)[0][1]
    differ = [a == b for a, b in zip(whole["chosen_ids"], whole["rejected_ids"], strict=False)].index(False)
    start = len(whole["prompt_ids"])
    _, report = tokenize(rows, max_length=start + differ)
    assert report.dropped == {"chosen and rejected are identical after the cut": [1]}
    assert (report.rows_cut, report.cut) == (0, {"prompt": 0, "chosen": 0, "rejected": 0})  # of those kept
    assert tokenize(rows, max_length=start + differ + 1)[1].cut == {"prompt": 0, "chosen": 1, "rejected": 1}


def test_tokens_and_report():
    rows = [pair(i, chosen=[assistant("word" + " word" * (i - 1))]) for i in range(1, 21)]
    tokenized, report = tokenize(rows)
    assert tokenized.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    for side in ("prompt", "chosen", "rejected"):
        assert np.iinfo(tokenized.features[f"{side}_ids"].feature.dtype).max > 262_144  # Gemma's vocabulary
    assert np.iinfo(tokenized.features["row"].dtype).max > 10**9
    chat = ChatFormat.probe(make_tokenizer("llama3"))
    for row, ids in zip(rows, tokenized, strict=True):
        expected = chat.pair_ids(row["prompt"], row["chosen"], row["rejected"])
        assert (ids["prompt_ids"], ids["chosen_ids"], ids["rejected_ids"]) == expected
    assert report.tokens["chosen"] == sum(len(ids) for ids in tokenized["chosen_ids"])
    rows, reasons = [0, 1, 2, 3, 4], [None, None, "bad", None, None]
    report = DataReport(rows, reasons, {"chosen": np.array([1200, 1, 9, 2, 5])}, {"chosen": np.zeros(5, dtype=bool)})
    assert report.lengths == {"chosen": {"median": 3, "p95": 1020, "max": 1200}}  # 3.5, 5 + 0.85 * 1195


def test_every_limit_of_pairs_is_a_key_that_later_scores_take_over():
    """Figures would otherwise show other pairs than the run was trained on."""
    others = {"dataset", "chat_format", "max_dropped_fraction", "max_truncated_fraction", "num_proc"}
    assert {*inspect.signature(tokenize_pairs).parameters} - others == {*LIMITS}
    assert {*LIMITS} <= {field.name for field in dataclasses.fields(PairConfig)}
    assert LIMITS.items() <= BENCHMARKS["hh"].defaults.items()  # which can't import them: it has to be light


def load(tmp_path, rows, split="train"):
    write(tmp_path / "train.jsonl", rows)
    return load_pairs(config(tmp_path), split).to_list()


def test_conversational_rows_stay_as_they_are(tmp_path):
    rows = pairs(0, 1)
    rows[1]["prompt"] = [{"role": "system", "content": "Be brief\n"}, user("  a"), assistant("b "), user("c\n\n")]
    rows[1]["chosen"] = [assistant("    indented()\n")]
    assert load(tmp_path, rows) == [{**row, "row": i} for i, row in enumerate(rows)]


def test_full_dialogues_whose_shared_turns_are_the_prompt(tmp_path):
    """The form of UltraFeedback-binarized; its text column `prompt` does not make the dialogues responses."""
    shared = [user("a"), assistant("b"), user("c")]
    row = {
        "prompt": "a",
        "chosen": [*shared, assistant("d")],
        "rejected": [*shared, assistant("e")],
        "score_chosen": 8.0,
    }
    expected = [{"prompt": shared, "chosen": [assistant("d")], "rejected": [assistant("e")], "row": 0}]
    assert load(tmp_path, [row]) == expected
    sides = tuple(expected[0][side] for side in ("prompt", "chosen", "rejected"))
    for prompt in ("anything", shared[:1], shared, None):
        assert formats.read_row({**row, "prompt": prompt}, formats.read_pair) == sides
    with pytest.raises(DataError, match="prompt"):  # the system message would be lost
        formats.read_row({**row, "prompt": [{"role": "system", "content": "s"}, *shared]}, formats.read_pair)
    # One dialogue and one response are no pair of dialogues.
    row = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]}
    assert formats.read_row(row, formats.read_pair) == ([user("a")], row["chosen"], row["rejected"])


def test_anthropic_hh_texts(tmp_path):
    start = "\n\nHuman:  Hello \n\nAssistant: Hi!\n\nHuman: Say Assistant: now\nHuman: or later"
    rows = [
        {"chosen": f"{start}\n\nAssistant: Now.\n\nThen.", "rejected": f"{start}\n\nAssistant: No"},
        {"chosen": f"{start}\n\nAssistant: Yes", "rejected": "\n\nHuman: Hello\n\nAssistant: What?"},
    ]
    first, second = load(tmp_path, rows)
    assert first["prompt"] == [user("Hello"), assistant("Hi!"), user("Say Assistant: now\nHuman: or later")]
    assert (first["chosen"], first["rejected"]) == ([assistant("Now.\n\nThen.")], [assistant("No")])
    _, report = tokenize([first, second])
    assert report.dropped == {"chosen is not one assistant message after the prompt": [1]}
    row = {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi!", "rejected": "\n\nHuman: Hello\n\nAssistant:"}
    assert formats.read_row(row, formats.read_pair) == ([user("Hello")], [assistant("Hi!")], [assistant("")])
    text = "Go on with this:\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman:"
    (row,) = load(tmp_path, [{**pair(0), "prompt": text}])
    assert row["prompt"] == [user(text)]


DIALOGUE = [user("b"), assistant("c"), user("d")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": " \n\nHuman: Hello\n\nAssistant:"}, [user("Hello")]),
        ({"prompt": "\n\nHuman: Hello\n\nAssistant: Hi"}, [user("Hello"), assistant("Hi")]),
        ({"prompt": "a", "messages": DIALOGUE}, [user("a")]),
        ({"prompt": "", "messages": DIALOGUE}, [user("")]),
        ({"prompt": None, "messages": DIALOGUE[:2]}, DIALOGUE[:1]),
        ({"messages": [*DIALOGUE, assistant("e")]}, DIALOGUE),
    ],
)
def test_the_prompt_of_a_row(row, messages):
    assert formats.read_row(row, formats.read_prompt) == (messages,)


def test_responses_without_a_prompt_and_empty_texts():
    with pytest.raises(DataError, match="no prompt"):
        formats.read_row({"chosen": "b", "rejected": "c"}, formats.read_pair)
    for prompt, response in (("", None), ([user(None)], [assistant(None)])):
        row = {"prompt": prompt, "chosen": "b", "rejected": response}
        assert formats.read_row(row, formats.read_pair) == ([user("")], [assistant("b")], [assistant("")])
    for chosen, rejected in (("Yes", "yes"), ("a  b", "a b")):
        assert formats.unusable_pair([user("q")], [assistant(chosen)], [assistant(rejected)]) is None


def test_a_system_column_is_a_message_in_front(tmp_path):
    pirate = {"role": "system", "content": " Answer like a pirate.\n"}
    texts = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [{"system": text, **texts} for text in (pirate["content"], "", None)]
    sides = ([assistant("yes")], [assistant("no")])
    for row, prompt in zip(rows, ([pirate, user("q")], [user("q")], [user("q")]), strict=True):
        assert formats.read_row(row, formats.read_pair) == (prompt, *sides)
    turns = {"chosen": [pirate, user("q"), assistant("yes")], "rejected": [pirate, user("q"), assistant("no")]}
    assert load(tmp_path, [{"system": " Answer like a pirate.\n", **turns}])[0]["prompt"] == [pirate, user("q")]
    prompt = formats.read_row({"system": "Be brief", **turns}, formats.read_pair)[0]
    assert formats.unusable_prompt(prompt) == "roles out of order"  # two system messages


def test_what_shapes_a_prompt_is_refused_but_may_be_empty_or_left_out(tmp_path):
    for bad, named in (
        ({"tools": ["x"]}, "`tools`"),
        ({"prompt": [{**user("a"), "tool_calls": "x"}]}, "`prompt` .*tool_calls"),
        ({"chosen": [{**assistant("a"), "reasoning_content": "x"}]}, "`chosen` .*reasoning_content"),
    ):
        with pytest.raises(DataError, match=named):
            formats.read_row(pair(0) | bad, formats.read_pair)
    message = {**user("Question 0"), "tool_calls": None, "tools": [], "name": "x"}
    rows = [{**pair(0), "prompt": [message], "tools": None, "documents": []}, {**pair(1), "tools": [], "score": 3}]
    assert load(tmp_path, rows) == [{**pair(0), "row": 0}, {**pair(1), "row": 1}]
    write(tmp_path / "train.jsonl", [{**pair(0), "tools": [{"name": "search"}]}])
    entries = [{"path": str(tmp_path), "columns": ["prompt", "chosen", "rejected"]}]
    assert load_pairs(DataConfig(datasets=entries), "train").to_list() == [{**pair(0), "row": 0}]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": [{"role": "human", "content": "a"}]}, "`prompt` has .*human"),
        ({"chosen": [{"from": "gpt", "value": "a"}]}, "`chosen` has .*gpt"),
        ({"rejected": [{"role": "assistant", "content": 5}]}, "`rejected` has .*5"),
        ({"prompt": 5}, "`prompt` has 5"),
    ],
)
def test_values_that_are_not_messages(bad, message):
    with pytest.raises(DataError, match=f"^{message}"):
        formats.read_row({**pair(1), **bad}, formats.read_pair)


SYSTEM = {"role": "system", "content": "Be brief"}
NO_ANSWER = "the dialogue does not end with an assistant message"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM, user("a"), assistant("b")], None),
        ([user("a"), assistant("b"), user("c")], NO_ANSWER),
        ([SYSTEM, assistant("b")], "the prompt is empty"),
        ([user("a"), user("a"), assistant("c")], "roles out of order"),
        ([user("a"), assistant(""), user("b"), assistant("c")], "the prompt has an empty message"),
    ],
)
def test_why_a_dialogue_is_unusable(messages, reason):
    assert formats.unusable_dialogue(messages) == reason


@pytest.mark.parametrize(
    "name, split, rows, dropped",
    [
        ("hh-harmless", "train", 1800, {
            "chosen is not one assistant message after the prompt": [58, 118, 762, 886],
            "roles out of order": [152, 853, 1054],
            "chosen is empty": [512, 954, 1311, 1500],
        }),
        ("judged-pairs", "test", 208, {}),
    ],
)  # fmt: skip
def test_real_pairs(shared_data, name, split, rows, dropped):
    dataset = load_pairs(config(shared_data / name), split)
    limits = {"max_length": 2048, "max_prompt_length": 1800, "max_dropped_fraction": 0.02}
    tokenized, report = tokenize(dataset, "zephyr", **limits)
    assert (report.rows, report.dropped) == (rows, dropped)
    assert len(tokenized) == report.kept
    for prompt, chosen in zip(tokenized["prompt_ids"][:20], tokenized["chosen_ids"][:20], strict=True):
        assert prompt[0] == 1 and len(prompt) + len(chosen) <= 2048
