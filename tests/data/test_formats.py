"""The accepted forms of pairs and dialogues, values that are not messages, real data."""

import pytest

from rmipo.data.chat import DataError
from rmipo.data.pairs import ChatFormat, load_messages, load_pairs, tokenize_pairs
from tests.helpers.families import make_tokenizer
from tests.helpers.rows import assistant, config, pair, pairs, tokenize, user, write


def load(tmp_path, rows, split="train"):
    write(tmp_path / "train.jsonl", rows)
    return load_pairs(config(tmp_path), split).to_list()


def test_conversational_rows_stay_as_they_are(tmp_path):
    rows = pairs(0, 1)
    rows[1]["prompt"] = [{"role": "system", "content": "Be brief"}, user("a"), assistant("b"), user("c")]
    assert load(tmp_path, rows) == [{**row, "row": i} for i, row in enumerate(rows)]


def test_prompt_and_responses_as_text(tmp_path):
    rows = [{"prompt": "Question 0", "chosen": "Right 0", "rejected": "Wrong 0"}]
    assert load(tmp_path, rows) == [{**pair(0), "row": 0}]


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
    del row["prompt"]
    assert load(tmp_path, [row]) == expected


def test_anthropic_hh_texts(tmp_path):
    start = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Say Assistant: now\nor later"
    rows = [
        {"chosen": f"{start}\n\nAssistant: Now.\n\nThen.", "rejected": f"{start}\n\nAssistant: No"},
        {"chosen": f"{start}\n\nAssistant: Yes", "rejected": "\n\nHuman: Hello\n\nAssistant: What?"},
    ]
    first, second = load(tmp_path, rows)
    assert first["prompt"] == [user("Hello"), assistant("Hi!"), user("Say Assistant: now\nor later")]
    assert (first["chosen"], first["rejected"]) == ([assistant("Now.\n\nThen.")], [assistant("No")])
    _, report = tokenize([first, second])
    assert report.dropped == {"chosen is 3 messages after the shared prompt, not one": [1]}


def test_an_anthropic_hh_prompt_column(tmp_path):
    rows = [{"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": " Hi!", "rejected": " Go away."}]
    (row,) = load(tmp_path, rows)
    assert row["prompt"] == [user("Hello")]
    assert row["chosen"] == [assistant(" Hi!")]


def test_responses_without_a_prompt(tmp_path):
    rows = [{"chosen": "b", "rejected": "c"}] * 7
    with pytest.raises(DataError, match=r"no prompt: there is no `prompt` column .*: rows 0, 1, 2, 3, 4 and 2 more"):
        load(tmp_path, rows)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            {"prompt": [{"role": "human", "content": "a"}]},
            "`prompt` has the role 'human', expected system, user",
        ),
        (
            {"chosen": [{"from": "gpt", "value": "a"}]},
            "`chosen` holds keys .*from, value.*, expected messages",
        ),
        ({"rejected": [{"role": "assistant", "content": 5}]}, "`rejected` has content of type int, expected text"),
        ({"rejected": 7}, "`rejected` is int, expected messages or text"),
        ({"prompt": ["a"]}, "`prompt` holds str, expected messages"),
    ],
)
def test_values_that_are_not_messages(tmp_path, bad, message):
    rows = [pair(0), {**pair(1), **bad}, pair(2)]
    with pytest.raises(DataError, match=f"(?s)rows that can't be read\n- {message}.*: row 1\nAccepted forms"):
        load(tmp_path, rows)


def test_messages(tmp_path, caplog):
    dialogue = [user("a"), assistant("b"), user("c"), assistant("d")]
    write(tmp_path / "train.jsonl", [{"prompt": "x", "messages": dialogue}, {"prompt": "x", "messages": dialogue[:2]}])
    dataset = load_messages(config(tmp_path), "train")
    assert dataset.to_list() == [{"messages": dialogue, "row": 0}, {"messages": dialogue[:2], "row": 1}]
    rows = [{"prompt": "a", "completion": "b"}] * 9 + [{"prompt": "a", "completion": ""}]
    write(tmp_path / "test.jsonl", rows)
    assert load_messages(config(tmp_path, max_dropped_fraction=0.1), "test").to_list()[8] == {
        "messages": dialogue[:2],
        "row": 8,
    }
    assert "1 dropped, the response is empty: row 9" in caplog.text
    with pytest.raises(DataError, match="1 of 10 rows can't be used, more than max_dropped_fraction"):
        load_messages(config(tmp_path), "test")


def test_dialogues_must_end_with_the_assistant(tmp_path):
    write(tmp_path / "train.jsonl", [{"messages": [user("a")]}, {"messages": [user("a"), assistant("b")]}])
    with pytest.raises(DataError, match="1 dropped, the dialogue does not end with an assistant message: row 0"):
        load_messages(config(tmp_path), "train")


@pytest.mark.parametrize(
    "name, split, rows, dropped",
    [
        (
            "hh-harmless",
            "train",
            1800,
            {
                "chosen is 2 messages after the shared prompt, not one": [58, 118, 762, 886],
                "roles out of order: assistant after assistant": [152, 853, 1054],
                "chosen is empty": [512, 954, 1311, 1500],
            },
        ),
        (
            "hh-harmless",
            "test",
            300,
            {
                "roles out of order: assistant after assistant": [52],
                "rejected is 2 messages after the shared prompt, not one": [104],
            },
        ),
        ("judged-pairs", "test", 208, {}),
    ],
)
def test_real_pairs(shared_data, name, split, rows, dropped):
    dataset = load_pairs(config(shared_data / name), split)
    tokenized, report = tokenize_pairs(
        dataset,
        ChatFormat.probe(make_tokenizer("zephyr")),
        max_length=2048,
        max_prompt_length=1800,
        max_dropped_fraction=0.02,
        max_truncated_fraction=1.0,
    )
    assert (report.rows, report.dropped) == (rows, dropped)
    assert len(tokenized) == rows - report.dropped_rows
    for prompt, chosen in zip(tokenized["prompt_ids"][:20], tokenized["chosen_ids"][:20], strict=True):
        assert prompt[0] == 1
        assert len(prompt) + len(chosen) <= 2048


def test_real_dialogues(shared_data):
    assert len(load_messages(config(shared_data / "instruct-sft"), "test")) == 400
