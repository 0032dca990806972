"""The accepted formats of pairs, values that are not messages, real data."""

import pytest

from rmipo.data import formats
from rmipo.data.chat import DataError
from rmipo.data.pairs import load_pairs
from rmipo.recipe.schema import DataConfig
from tests.helpers.rows import assistant, config, pair, pairs, tokenize, user, write


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
