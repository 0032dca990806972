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
        assert formats.read_row({**row, "prompt": prompt}, formats.PAIRS) == sides
    del row["prompt"]
    assert load(tmp_path, [row]) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("a"), assistant("b")], [assistant("c")]),
        ([assistant("b")], [user("a"), assistant("c")]),
        ([user("a"), assistant("b")], []),
        ("b", [user("a"), assistant("c")]),
    ],
)
def test_one_dialogue_and_one_response_are_not_a_pair_of_dialogues(chosen, rejected):
    row = {"prompt": "a", "chosen": chosen, "rejected": rejected}
    chosen, rejected = ([assistant(side)] if isinstance(side, str) else side for side in (chosen, rejected))
    assert formats.read_row(row, formats.PAIRS) == ([user("a")], chosen, rejected)


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
    assert report.dropped == {"chosen is 3 messages after the shared prompt, not one": [1]}
    row = {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi!", "rejected": "\n\nHuman: Hello\n\nAssistant:"}
    assert formats.read_row(row, formats.PAIRS) == ([user("Hello")], [assistant("Hi!")], [assistant("")])
    text = "Go on with this:\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman:"
    (row,) = load(tmp_path, [{**pair(0), "prompt": text}])
    assert row["prompt"] == [user(text)]


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("\n\nHuman: Hello", [user("Hello")]),
        (" \n\nHuman: Hello\n\nAssistant:", [user("Hello")]),
        ("\n\nHuman: Hello\n\nAssistant: Hi", [user("Hello"), assistant("Hi")]),
        ("\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman:", [user("Hello"), assistant("Hi"), user("")]),
    ],
)
def test_an_anthropic_hh_prompt_ends_where_its_text_ends(prompt, messages):
    assert formats.read_row({"prompt": prompt}, formats.PROMPTS) == (messages,)


def test_responses_without_a_prompt_and_empty_texts():
    for row in (
        {"prompt": None, "chosen": "b", "rejected": "c"},
        {"chosen": [assistant("b"), user("c")], "rejected": [assistant("d"), user("e")]},
    ):
        with pytest.raises(DataError, match="no prompt, and the other columns match no accepted format"):
            formats.read_row(row, formats.PAIRS)
    for prompt, response in (("", None), ([user(None)], [assistant(None)])):
        row = {"prompt": prompt, "chosen": "b", "rejected": response}
        assert formats.read_row(row, formats.PAIRS) == ([user("")], [assistant("b")], [assistant("")])
    for chosen, rejected in (("Yes", "yes"), ("a  b", "a b")):
        assert formats.unusable_pair([user("q")], [assistant(chosen)], [assistant(rejected)]) is None
    assert formats.unusable_pair([user("q")], [assistant("")], [assistant(" ")]) == "chosen is empty"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "messages": [user("b")]}, [user("a")]),
        ({"prompt": "", "messages": [user("b")]}, [user("")]),
        ({"prompt": None, "messages": [user("b"), assistant("c")]}, [user("b")]),
        ({"messages": [user("b"), assistant("c"), user("d")]}, [user("b"), assistant("c"), user("d")]),
        ({"messages": [user("b"), assistant("c"), user("d"), assistant("e")]}, [user("b"), assistant("c"), user("d")]),
        ({"messages": []}, []),
    ],
)
def test_the_prompt_of_a_row(row, prompt):
    assert formats.read_row(row, formats.PROMPTS) == (prompt,)


def test_a_system_column_is_a_message_in_front(tmp_path):
    pirate = {"role": "system", "content": " Answer like a pirate.\n"}
    texts = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [{"system": text, **texts} for text in (pirate["content"], "", None)]
    row = {"system": "Be brief", "chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    assert formats.read_row(row, formats.PAIRS)[0] == [SYSTEM]  # in front of no turns
    sides = ([assistant("yes")], [assistant("no")])
    for row, prompt in zip(rows, ([pirate, user("q")], [user("q")], [user("q")]), strict=True):
        assert formats.read_row(row, formats.PAIRS) == (prompt, *sides)
    turns = {"chosen": [pirate, user("q"), assistant("yes")], "rejected": [pirate, user("q"), assistant("no")]}
    assert load(tmp_path, [{"system": " Answer like a pirate.\n", **turns}])[0]["prompt"] == [pirate, user("q")]
    for other in ("Be brief", "Answer like a pirate."):
        with pytest.raises(DataError, match="`system` differs from the system message of the row: "):
            formats.read_row({"system": other, **turns}, formats.PAIRS)
    with pytest.raises(DataError, match="`system` is int, expected text"):
        formats.read_row({**rows[0], "system": 3}, formats.PAIRS)


COLUMNS = "system_prompt system_message history tools functions documents images chat_template_kwargs"
KEYS = (
    "tools functions tool_calls tool_call_id tool_plan function_call function_calls reasoning_content reasoning thinking "
    "thought images"
)


def test_each_column_and_key_that_shapes_a_prompt_is_refused():
    for name in COLUMNS.split():
        with pytest.raises(DataError, match=f"`{name}` is part of the prompt, but is not supported"):
            formats.read_row({**pair(0), name: ["x"]}, formats.PAIRS)
    for name in KEYS.split():
        for side in pair(0):
            turns = [{**message, name: "x"} for message in pair(0)[side]]
            with pytest.raises(DataError, match=f"`{side}` has messages with {name}: "):
                formats.read_row({**pair(0), side: turns}, formats.PAIRS)


def test_what_shapes_a_prompt_may_be_empty_or_left_out(tmp_path):
    message = {**user("Question 0"), "tool_calls": None, "tools": [], "name": "x"}
    rows = [{**pair(0), "prompt": [message], "tools": None, "documents": []}, {**pair(1), "tools": [], "score": 3}]
    assert load(tmp_path, rows) == [{**pair(0), "row": 0}, {**pair(1), "row": 1}]
    write(tmp_path / "train.jsonl", [{**pair(0), "tools": [{"name": "search"}]}])
    entries = [{"path": str(tmp_path), "columns": ["prompt", "chosen", "rejected"]}]
    assert load_pairs(DataConfig(datasets=entries), "train").to_list() == [{**pair(0), "row": 0}]


def test_a_prompt_that_is_not_the_one_of_the_dialogues_is_refused(tmp_path):
    pirate = {"role": "system", "content": "Answer like a pirate."}
    turns = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    assert load(tmp_path, [{"prompt": [user("q")], **turns}])[0]["prompt"] == [user("q")]
    for prompt in ([pirate, user("q")], [user("p")]):
        with pytest.raises(DataError, match=r"`prompt` differs.*: row 0"):
            load(tmp_path, [{"prompt": prompt, **turns}])


def test_columns_and_keys_of_messages_that_are_not_read_are_named(tmp_path, caplog):
    for _ in range(2):
        load(tmp_path, [{**pair(0), "system": None, "score_chosen": 1.0, "context": "Some text."}])
    assert caplog.text.count(f"{tmp_path}: columns that are not read: context\n") == 1  # of both splits
    caplog.clear()
    load(tmp_path, [{**pair(0), "system": None, "kind": "boilerplate", "prompt_id": "a"}])  # as written here
    assert not caplog.text
    turn = {**assistant("Right"), "language": "en", "name": "Ada"}
    load(tmp_path, [pair(0), pair(1, chosen=[{**turn, "cached": None}])])
    assert f"{tmp_path}: keys of messages that are not read: language, name\n" in caplog.text
    caplog.clear()
    dialogues = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    load(tmp_path, [{"prompt": "a", **dialogues}])
    assert "not read" not in caplog.text
    load(tmp_path, [{"prompt": "Be brief. a", **dialogues}])
    assert "not read: prompt (a text" in caplog.text


MARKED = (
    "Human: hi", " Assistant: hi", "hi\n\nHuman: you", "<|im_start|>user\nhi", "<|user|>\nhi", "[INST] hi [/INST]",
    "Say hi\nUser: more", "### Instruction:\nSay hi", "hi\nBot: hello", "<start_of_turn>user",
    '[{"role": "user", "content": "hi"}]',
)  # fmt: skip


def test_markers_of_turns_inside_of_texts_are_told():
    plain = ["The Human: a study", "Assistant", "[INSTALL]", "a list [1, 2]", "Ask the user: hi"]
    rows = [pair(i, prompt=[user(text)]) for i, text in enumerate([*plain, *MARKED])]
    _, report = tokenize([*rows, pair(40, chosen=[assistant(MARKED[0])])])
    (note,) = report.notes
    assert note.startswith(f"{len(MARKED) + 1} have") and f"rows {len(plain)}, " in note
    _, report = tokenize(rows[: len(plain)])
    assert not report.notes


@pytest.mark.parametrize("other", ['"c"', '[{"role": "assistant", "content": "c"}]'])
def test_a_lone_surrogate_is_refused(tmp_path, other):
    """JSON can hold half of a character; a tokenizer can't. datasets reads a column of mixed types in another way."""
    rows = ['"b\\udc00"', other]
    lines = [f'{{"prompt": "a", "chosen": {chosen}, "rejected": "c"}}\n' for chosen in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=r"train\.jsonl can't be read as json: .*surrogate"):
        load_pairs(config(tmp_path), "train")


def test_a_format_is_a_function_and_a_line(tmp_path, monkeypatch):
    def read_best_and_worst(row):
        return ([user(row["question"])], [assistant(row["best"])], [assistant(row["worst"])])

    best = formats.Format(("question", "best", "worst"), read_best_and_worst)
    write(tmp_path / "train.jsonl", [{"question": "Question 0", "best": "Right 0", "worst": "Wrong 0"}])
    monkeypatch.setattr("rmipo.data.pairs.PAIRS", (*formats.PAIRS, best))
    assert load_pairs(config(tmp_path), "train").to_list() == [{**pair(0), "row": 0}]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": [{"role": "human", "content": "a"}]}, "`prompt` has the role 'human', expected system, user"),
        ({"chosen": [{"from": "gpt", "value": "a"}]}, "`chosen` holds keys .*from, value"),
        ({"rejected": [{"role": "assistant", "content": 5}]}, "`rejected` has content of type int"),
        ({"prompt": ["a"]}, "`prompt` holds str"),
        ({"prompt": user("a")}, "`prompt` is dict"),
        ({"prompt": [{"role": "user"}]}, "`prompt` holds keys role"),
    ],
)
def test_values_that_are_not_messages(bad, message):
    with pytest.raises(DataError, match=f"^{message}"):
        formats.read_row({**pair(1), **bad}, formats.PAIRS)


SYSTEM = {"role": "system", "content": "Be brief"}
NO_ANSWER = "the dialogue does not end with an assistant message"
NO_TURNS = "the prompt is empty"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM, user("a"), assistant("b")], None),
        ([SYSTEM, user("a"), SYSTEM], NO_ANSWER),
        ([user("a"), assistant("b"), user("c")], NO_ANSWER),
        ([user("a"), assistant(" \n")], "the response is empty"),
        ([SYSTEM, assistant("b")], NO_TURNS),
        ([SYSTEM, assistant("a"), user("b"), assistant("c")], "roles out of order"),
        ([SYSTEM, SYSTEM, user("b"), assistant("c")], "roles out of order"),
        ([user("a"), user("a"), assistant("c")], "roles out of order"),
        ([user("a"), assistant("b"), SYSTEM, user("b"), assistant("c")], "roles out of order"),
        ([user("a"), assistant(""), user("b"), assistant("c")], "the prompt has an empty message"),
    ],
)
def test_why_a_dialogue_is_unusable(messages, reason):
    assert formats.unusable_dialogue(messages) == reason


@pytest.mark.parametrize(
    "name, split, rows, dropped",
    [
        ("hh-harmless", "train", 1800, {
            "chosen is 2 messages after the shared prompt, not one": [58, 118, 762, 886],
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
