"""Dialogues for SFT: their formats, the unusable ones, and those that TRL cuts."""

import pytest
from datasets import concatenate_datasets
from tokenizers import normalizers
from trl import SFTConfig, SFTTrainer

from rmipo.data.chat import ChatFormat, DataError
from rmipo.data.dialogues import load_dialogues, select_dialogues
from rmipo.fingerprints import rows_fingerprint
from tests.helpers.families import LLAMA3_TEMPLATE, make_model, make_tokenizer
from tests.helpers.rows import assistant, config, user, write

DIALOGUE = [user("a"), assistant("b"), user("c"), assistant("d")]
SYSTEM = {"role": "system", "content": "Be brief"}
WINDOW = 100
LONG = [user("a"), assistant("long " * 60)]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.probe(make_tokenizer("llama3"))


def load(tmp_path, dialogues):
    write(tmp_path / "train.jsonl", [{"messages": messages} for messages in dialogues])
    return load_dialogues(config(tmp_path), "train")


def select(rows, chat, tmp_path, limits=None, **arguments):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{"max_length": 50} | arguments)
    return select_dialogues(rows, chat, config(tmp_path, **limits or {}), args)


def test_dialogues_are_read(tmp_path):
    assert load(tmp_path, [DIALOGUE, DIALOGUE[:2]]).to_list() == [
        {"messages": DIALOGUE, "completion": [], "row": 0},
        {"messages": DIALOGUE[:2], "completion": [], "row": 1},
    ]
    write(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b", "system": "Be brief"}])
    assert load_dialogues(config(tmp_path), "test").to_list() == [
        {"messages": [SYSTEM, *DIALOGUE[:2]], "completion": [assistant("b")], "row": 0}
    ]
    with pytest.raises(DataError, match="`tools`"):
        write(tmp_path / "test.jsonl", [{"messages": DIALOGUE, "tools": [{"name": "search"}]}])
        load_dialogues(config(tmp_path), "test")


def completions(tmp_path, *more):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:], "system": "Be brief"},
    ]
    write(tmp_path / "train.jsonl", [*rows, *more])
    return load_dialogues(config(tmp_path), "train")


def trained_texts(dataset, chat, tmp_path, **arguments):
    arguments = {"max_length": WINDOW} | arguments
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **arguments)
    rows = dataset.remove_columns(["row", "ids"])
    trainer = SFTTrainer(make_model("llama3"), args, train_dataset=rows, processing_class=chat.tokenizer)
    return [chat.tokenizer.decode([id for id in labels if id != -100]) for labels in trainer.train_dataset["labels"]]


def test_what_the_loss_is_on_with_trl(tmp_path, chat):
    rows = completions(tmp_path, {"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:]})
    kept, _ = select(rows, chat, tmp_path, max_length=WINDOW)
    *texts, several = trained_texts(kept, chat, tmp_path)
    assert texts == ["b<|eot_id|>", "d<|eot_id|>"]
    assert several.startswith("b<|eot_id|>") and several.endswith("d<|eot_id|>")
    kept, _ = select(completions(tmp_path), chat, tmp_path, max_length=WINDOW, completion_only_loss=False)
    texts = trained_texts(kept, chat, tmp_path, completion_only_loss=False)
    assert texts == [chat.tokenizer.apply_chat_template(messages, tokenize=False) for messages in kept["messages"]]
    loaded = concatenate_datasets([completions(tmp_path), load(tmp_path, [DIALOGUE])])
    assert "messages" in select(loaded, chat, tmp_path, max_length=WINDOW)[0].column_names
    with pytest.raises(DataError, match="completion_only_loss: 1 of 3 rows"):
        select(loaded, chat, tmp_path, completion_only_loss=True, max_length=WINDOW)


@pytest.mark.parametrize("answers", [False, True])
def test_a_row_is_kept_from_its_first_token_in_the_window_on(tmp_path, chat, answers):
    """TRL drops it, too, and says nothing."""
    long = [user("long " * 120), assistant("b")]
    row = {"prompt": long[:1], "completion": "b"}
    loaded = load(tmp_path, [DIALOGUE, long]) if answers else completions(tmp_path, row)
    half = {"max_dropped_fraction": 0.5}
    kept, report = select(loaded, chat, tmp_path, half, max_length=WINDOW, assistant_only_loss=answers)
    assert report.dropped == {"the prompt fills the window": [len(loaded) - 1]} and report.rows_cut == 0
    assert len(kept) == len(loaded) - 1
    if not answers:
        assert len(trained_texts(kept, chat, tmp_path)) == 2
    for other in ({"max_length": None}, {"packing": True, "packing_strategy": "wrapped"}):
        given = {"max_length": WINDOW, "assistant_only_loss": answers} | other
        assert select(loaded, chat, tmp_path, **given)[1].dropped == {}
    loaded = load(tmp_path, [DIALOGUE[:2], DIALOGUE[:2]]) if answers else completions(tmp_path).select([0])
    start = len(chat.prompt_ids(DIALOGUE[:1]))
    kept, report = select(loaded, chat, tmp_path, max_length=start + 1, assistant_only_loss=answers)
    assert (len(kept), report.rows_cut) == (len(loaded), len(loaded))
    with pytest.raises(DataError, match="dropped, the prompt fills the window: row"):
        select(loaded, chat, tmp_path, max_length=start, assistant_only_loss=answers)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_marks_of_single_turns_are_refused(tmp_path, mark):
    """TRL would train the turn all the same."""
    with pytest.raises(DataError, match=rf"row 1: .*{next(iter(mark))}"):
        load(tmp_path, [DIALOGUE, [user("a"), assistant("b") | mark]])


def test_rows_are_told_apart_by_their_token_ids(tmp_path, chat):
    """A run that goes on, or is found finished, with an edited tokenizer is another run."""
    rows = load(tmp_path, [[user("A"), assistant("B")]])
    edited = make_tokenizer("llama3")
    edited.backend_tokenizer.normalizer = normalizers.Lowercase()
    before, again, after = (
        rows_fingerprint(select(rows, each, tmp_path)[0])
        for each in (chat, ChatFormat.probe(make_tokenizer("llama3")), ChatFormat.probe(edited))
    )
    assert before == again != after


def test_unusable_dialogues_are_dropped_and_named(tmp_path, chat):
    reason = "the response is empty"
    rows = load(tmp_path, [DIALOGUE] * 9 + [[user("a"), assistant("")]]).select(range(9, -1, -1))  # the last row first
    kept, report = select(rows, chat, tmp_path, {"max_dropped_fraction": 0.1})
    assert (report.dropped, kept["row"][:]) == ({reason: [9]}, list(range(8, -1, -1)))
    assert f"- 1 dropped, {reason}: row 9" in report.lines()
    with pytest.raises(DataError, match=r"1 of 10 rows .*max_dropped_fraction"):
        select(rows, chat, tmp_path, {"max_dropped_fraction": 0.09})
    rows = load(tmp_path, [[assistant("b")], [{"role": "system", "content": ""}, *DIALOGUE]])
    assert len(select(rows, chat, tmp_path)[0]) == 2
    rows = completions(tmp_path, {"prompt": [], "completion": "b"})
    report = select(rows, chat, tmp_path, {"max_dropped_fraction": 0.5}, max_length=WINDOW)[1]
    assert report.dropped == {"the prompt is empty": [2]}
    cut = LLAMA3_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    chat = ChatFormat.probe(make_tokenizer("llama3", cut))
    early = [user("a"), assistant("hm</think>b"), user("c"), assistant("d")]
    rows = load(tmp_path, [DIALOGUE, [user("a"), assistant("<think>hm</think>b")], early])
    dataset, report = select(rows, chat, tmp_path, {"max_dropped_fraction": 0.7})
    assert dataset["row"][:] == [0] and list(report.dropped.values()) == [[1, 2]]


def test_dialogues_that_are_cut_are_counted_as_tokens_of_the_template(tmp_path, chat):
    rows = load(tmp_path, [DIALOGUE, LONG, LONG])
    # As many as the template writes, of which TRL keeps the first `max_length`.
    lengths = [len(chat.tokenizer.apply_chat_template(m, tokenize=True)["input_ids"]) for m in (DIALOGUE, LONG, LONG)]
    assert lengths[0] < 50 < lengths[1]
    kept, report = select(rows, chat, tmp_path)
    assert len(kept) == 3 and kept.column_names == ["messages", "row", "ids"]
    assert (report.cut, report.rows_cut, report.tokens) == ({"messages": 2}, 2, {"messages": lengths[0] + 100})
    exactly = select(rows, chat, tmp_path, max_length=lengths[1])[1]
    assert (exactly.rows_cut, exactly.lengths["messages"]["max"]) == (0, lengths[1])
    zephyr = ChatFormat.probe(make_tokenizer("zephyr"))  # whose template leaves BOS out; TRL adds none
    text = zephyr.tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    length = len(zephyr.tokenizer(text, add_special_tokens=False)["input_ids"])
    report = select(load(tmp_path, [DIALOGUE]), zephyr, tmp_path, max_length=length)[1]
    assert (report.tokens, report.rows_cut) == ({"messages": length}, 0)


@pytest.mark.parametrize(
    ("packing", "strategy", "cut"), [(True, "bfd", 1), (True, "wrapped", 0), (False, "wrapped", 1)]
)
def test_packing_cuts_or_goes_on_in_the_next_block(tmp_path, chat, packing, strategy, cut):
    rows = load(tmp_path, [DIALOGUE, LONG])
    assert select(rows, chat, tmp_path, packing=packing, packing_strategy=strategy)[1].rows_cut == cut
    if cut:
        with pytest.raises(DataError, match="1 of 2 rows are cut"):
            select(rows, chat, tmp_path, {"max_truncated_fraction": 0.4}, packing=packing)
