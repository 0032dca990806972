"""ChatFormat on the families' templates: texts written out by hand, properties over random dialogues, bad templates."""

import datetime
import random

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from rmipo.data.chat import ChatFormat, DataError, freeze_date
from tests.helpers.families import LLAMA3_TEMPLATE, make_tokenizer
from tests.helpers.rows import assistant, user

PROMPT = [user("Hi there"), assistant("Hello!"), user("How are you?")]
CHOSEN, REJECTED = [assistant("I am fine.")], [assistant("Not sure")]

# family -> (text of the prompt through the generation header, text of the chosen response)
WRITTEN_OUT = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "I am fine.<|eot_id|>",
    ),
    "mistral-instruct": ("<s>[INST] Hi there [/INST] Hello!</s>[INST] How are you? [/INST]", " I am fine.</s>"),
    "zephyr": (
        "<|user|>\nHi there</s>\n<|assistant|>\nHello!</s>\n<|user|>\nHow are you?</s>\n<|assistant|>\n",
        "I am fine.</s>",
    ),
    "qwen3": (
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nI am fine.<|im_end|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n",
        "I am fine.<end_of_turn>",
    ),
}
WORDS = ["the", "Paris", "window,", "a", "é日本", "1.", "🙂", "(x)", "==", "\n", "  ", "tokens\n\n", "[INST]", "|>"]


def random_dialogue(generator, family):
    def text():
        words = generator.choices(WORDS, k=generator.randint(1, 12))
        return " ".join(words) if "".join(words).strip() else "word"

    roles = ["user", "assistant"] * generator.randint(0, 2) + ["user"]
    prompt = [{"role": role, "content": text()} for role in roles]
    if family in ("llama3", "zephyr", "qwen3") and generator.random() < 0.5:
        prompt.insert(0, {"role": "system", "content": text()})
    return prompt, *([assistant(text())] for _ in range(2))


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_the_rendering_is_the_one_written_out(family):
    tokenizer = make_tokenizer(family)
    tokenizer.model_max_length = 8  # cuts nothing here: the recipe's lengths do
    chat = ChatFormat.probe(tokenizer)
    prompt, response = WRITTEN_OUT[family]
    prompt_ids, chosen_ids, _ = chat.pair_ids(PROMPT, CHOSEN, REJECTED)
    bos = "<s>" if family == "zephyr" else ""  # its template leaves BOS to the tokenizer
    expected = [
        chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (bos + prompt, bos + prompt + response)
    ]
    assert [prompt_ids, prompt_ids + chosen_ids] == expected and len(chosen_ids) > 1


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_random_dialogues(family):
    chat = ChatFormat.probe(make_tokenizer(family))
    generator = random.Random(0)
    tokenizer = chat.tokenizer
    for _ in range(60):
        prompt, chosen, rejected = random_dialogue(generator, family)
        prompt_ids, *ids = chat.pair_ids(prompt, chosen, rejected)
        assert prompt_ids == chat.prompt_ids(prompt)
        assert prompt_ids.count(tokenizer.bos_token_id) == (0 if family == "qwen3" else 1)
        if chat.bos_id is not None:
            assert prompt_ids[0] == chat.bos_id == tokenizer.bos_token_id
        for response, response_ids in zip((chosen, rejected), ids, strict=True):
            assert response_ids.index(chat.end_id) == len(response_ids) - 1
            decoded = tokenizer.decode(response_ids[:-1]).removeprefix("<think>\n\n</think>\n\n")
            assert decoded.strip() == response[0]["content"].strip()


@pytest.mark.parametrize(
    "family, header", [("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"), ("mistral-instruct", "")]
)
def test_the_header_belongs_to_the_prompt_or_to_the_response(family, header):
    tokenizer = make_tokenizer(family)
    in_prompt, in_response = ChatFormat.probe(tokenizer), ChatFormat.probe(tokenizer, header_in_response=True)
    assert tokenizer.decode(in_prompt.header_ids) == header
    prompt, chosen, _ = in_prompt.pair_ids(PROMPT, CHOSEN, REJECTED)
    shorter, longer, _ = in_response.pair_ids(PROMPT, CHOSEN, REJECTED)
    assert shorter + longer == prompt + chosen and len(longer) == len(chosen) + len(in_prompt.header_ids)
    assert in_response.prompt_ids(PROMPT) == shorter


def test_prior_contexts():
    llama, mistral, qwen = (ChatFormat.probe(make_tokenizer(name)) for name in ("llama3", "mistral-instruct", "qwen3"))
    contexts = [llama.prior_context(kind) for kind in ("bos", "header", "none")]
    assert contexts == [[0], [0, *llama.header_ids], []]
    assert mistral.prior_context("header") == mistral.prior_context("bos") == [1]
    assert qwen.prior_context("header") == list(qwen.header_ids)
    with pytest.raises(DataError, match="prior_context: bos"):
        qwen.prior_context("bos")
    for name, expected in (("llama3", 0), ("qwen3", qwen.end_id)):  # what a document follows
        without_header = ChatFormat.probe(make_tokenizer(name), header_in_response=True)
        assert without_header.prior_context("header") == [expected]


def test_a_token_across_the_end_of_the_prompt():
    """`Answer: ` + `the end` has the token ` the`, which generation after the prompt can't produce."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' Answer: ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer("llama3", template)
    chat = ChatFormat.probe(tokenizer)
    texts = [("Why?", "\nParis", "\nRome"), ("Which part?", "the end", "\nParis"), ("How?", "\nSlowly", "the end")]
    rows = [([user(question)], *([assistant(answer)] for answer in answers)) for question, *answers in texts]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = [
        (ids(f"<|begin_of_text|>{a} Answer: "), *(ids(f"{answer}<|eot_id|>") for answer in answers))
        for a, *answers in texts
    ]
    assert [chat.pair_ids(*row) for row in rows] == expected


def test_headers_and_responses_are_tokenised_apart():
    """SentencePiece puts one in front of a text, as its pre-tokenizer is in newer Llama and Mistral tokenizers."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + m['content'] + ' ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer("gemma", template)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    assert tokenizer.tokenize("the") == ["\u2581the"]
    chosen, rejected = [assistant("the end")], [assistant("the window")]
    prompt_ids, chosen_ids, _ = ChatFormat.probe(tokenizer).pair_ids([user("Why")], chosen, rejected)
    assert tokenizer.convert_ids_to_tokens(prompt_ids)[-1] == "\u2581"
    assert tokenizer.decode(chosen_ids) == "the end<eos>"
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' ' }}"
        "{% else %}{{ 'the answer: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'the answer: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer("llama3", template)
    header = tokenizer("the answer: ", add_special_tokens=False)["input_ids"]
    assert tokenizer("? the answer: ", add_special_tokens=False)["input_ids"][-len(header) :] != header
    assert list(ChatFormat.probe(tokenizer).header_ids) == header


def test_generation_stops_at_the_end_of_a_turn():
    chat = ChatFormat.probe(make_tokenizer("llama3"))
    for known, expected in ((None, [4]), (0, [0, 4]), ([1, 4], [1, 4])):
        config = GenerationConfig(eos_token_id=known)
        chat.set_end_of_turn(config)
        assert (chat.end_id, config.eos_token_id) == (4, expected)


def test_white_space_before_the_end_token_is_part_of_the_response():
    chat = ChatFormat.probe(make_tokenizer("llama3", LLAMA3_TEMPLATE.replace("'<|eot_id|>'", "'\n<|eot_id|>'")))
    assert chat.end_id == 4
    assert chat.tokenizer.decode(chat.pair_ids(PROMPT, CHOSEN, REJECTED)[1]) == "I am fine.\n<|eot_id|>"


def test_a_template_that_changes_or_leaves_out_a_message_is_told_per_row():
    first_paragraph = "message['content'].split('\n\n')[0] | trim"
    template = LLAMA3_TEMPLATE.replace("message['content'] | trim", first_paragraph)
    chat = ChatFormat.probe(make_tokenizer("llama3", template))
    kept, changed = [assistant(" Fine.\n\n")], [assistant("Fine.\n\nReally.")]
    assert chat.tokenizer.decode(chat.pair_ids(PROMPT, kept, REJECTED)[1]) == "Fine.<|eot_id|>"
    for sides in ((changed, kept), (kept, changed)):
        with pytest.raises(DataError, match="the assistant says"):
            chat.pair_ids(PROMPT, *sides)


END, BOS, HEADER = " + '<|eot_id|>'", "{{ bos_token }}", "assistant<|end_header_id|>"


@pytest.mark.parametrize(
    "old, new, message",
    [
        (END, "", "no end token"),
        (HEADER, "bot<|end_header_id|>", "not a prefix"),
        (BOS, "{% if messages[-1]['role'] == 'assistant' %}x{% endif %}" + BOS, "not a prefix"),
    ],
)
def test_bad_templates(old, new, message):
    assert old in LLAMA3_TEMPLATE
    tokenizer = make_tokenizer("llama3", LLAMA3_TEMPLATE.replace(old, new))
    with pytest.raises(DataError, match=message):
        ChatFormat.probe(tokenizer)


def test_no_bos():
    tokenizer = make_tokenizer("llama3", LLAMA3_TEMPLATE.replace("{{ bos_token }}", ""))
    chat = ChatFormat.probe(tokenizer)
    assert chat.bos_id == 0  # the tokenizer itself adds it
    assert chat.prompt_ids(PROMPT) == ChatFormat.probe(make_tokenizer("llama3")).prompt_ids(PROMPT)
    tokenizer = make_tokenizer("qwen3")
    tokenizer.bos_token = "<think>"  # a BOS that nothing writes
    assert ChatFormat.probe(tokenizer).bos_id is None


CLOCK = '{%- if strftime_now is defined %}{% set today = strftime_now("%d %b %Y") %}{% else %}{% set today = "?" %}{% endif %}'


def test_a_template_that_reads_the_clock_says_the_frozen_day_or_is_refused(tmp_path):
    tokenizer = make_tokenizer("llama3")
    plain = tokenizer.chat_template
    assert freeze_date(tokenizer, datetime.date(2026, 2, 3)) is False and tokenizer.chat_template == plain
    tokenizer.chat_template = (
        CLOCK + "{{ bos_token }}Today: {{ today }}, {{ strftime_now( '%Y' ) }}" + plain.replace("{{ bos_token }}", "")
    )
    assert freeze_date(tokenizer, datetime.date(2026, 2, 3)) is True
    tokenizer.save_pretrained(tmp_path)
    for which in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        text = which.apply_chat_template([user("a")], tokenize=False)
        assert text.startswith("<|begin_of_text|>Today: 03 Feb 2026, 2026<|start_header_id|>")
    assert freeze_date(tokenizer, datetime.date(2027, 1, 1)) is False
    tokenizer = make_tokenizer("llama3", "{{ strftime_now(style) }}")
    with pytest.raises(DataError, match="strftime_now"):
        freeze_date(tokenizer, datetime.date(2026, 2, 3))
