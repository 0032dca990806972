"""The check at start-up, with real pretrained weights: right layouts pass in every precision, wrong ones are refused."""

import contextlib
import functools
import types
import weakref
from unittest import mock

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, MistralConfig, MistralForCausalLM

from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import tokenize_pairs
from rmipo.errors import UserError
from rmipo.training import attention, parity
from rmipo.training.parity import ParityError, check_parity, first_rows
from tests.helpers.rows import assistant, pair, user
from tests.helpers.small_models import make_model, make_pairs

OURS = [
    (
        "Why does bread dough rise, and what happens if I leave it too long?",
        "Yeast eats the sugar in the flour and gives off carbon dioxide. The gluten holds the bubbles, so the dough "
        "grows. Left too long, the gluten gets weak, the bubbles run together and the loaf falls flat in the oven.",
        "Bread is a staple food in many cultures. There are many kinds of bread, such as rye, wheat and sourdough.",
    ),
    (
        "Write one sentence about the sea for a five-year-old.",
        "The sea is a giant bath where fish play hide and seek.",
        "The sea is the interconnected system of all the Earth's oceanic waters, including the Atlantic and Pacific.",
    ),
]
PRECISIONS = {"bfloat16": torch.bfloat16, "autocast": torch.float32, "float32": torch.float32}
WINDOW = 24


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


@pytest.fixture(scope="module", params=PRECISIONS)
def pretrained(request, smollm2):
    """`(model, precision)`."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=PRECISIONS[request.param]).eval(), request.param


@pytest.fixture(scope="module")
def four_layers(pretrained, ours):
    """The first layers, where a wrong layout counts most, by sliding window. Right layouts pass."""
    llama, precision = pretrained

    @functools.cache
    def make(window):
        values = {
            key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "layer_types")
        }
        mistral = MistralConfig(**values | {"sliding_window": window, "num_hidden_layers": 4})
        model = MistralForCausalLM(mistral).to(llama.dtype).eval()
        assert not model.load_state_dict(llama.state_dict(), strict=False).missing_keys
        check((model, precision), ours, "dense")
        return model, precision

    return make


@pytest.fixture(scope="module")
def chat(smollm2):
    return ChatFormat.probe(AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture(scope="module")
def ours(chat):
    pairs = [pair(i, [user(q)], [assistant(c)], [assistant(r)]) | {"row": i} for i, (q, c, r) in enumerate(OURS)]
    limits = {"max_length": 192, "max_prompt_length": 128, "max_dropped_fraction": 1.0, "max_truncated_fraction": 1.0}
    return tokenize_pairs(Dataset.from_list(pairs), chat, **limits)[0].to_list()


PLAIN = weakref.WeakKeyDictionary()


def plain_once(model, unwrapped, rows, implementation, plain=parity._plain):
    """The plain forward depends neither on the kind nor on the layout of packed pairs: one serves all tests of a model."""
    scored = PLAIN.setdefault(model, {})
    key = (repr(rows), implementation)
    if key not in scored:
        scored[key] = plain(model, unwrapped, rows, implementation)
    return scored[key]


def check(pretrained, rows, kind):
    model, precision = pretrained
    attention.attach(model, kind)
    with autocast(precision), mock.patch.object(parity, "_plain", plain_once):
        return check_parity(model, model, rows, kind)


@pytest.mark.parametrize("kind", ["segment", "dense", "flex"])
def test_right_layouts_pass_in_every_precision(pretrained, ours, kind):
    assert check(pretrained, ours, kind) < (1e-4 if pretrained[1] == "float32" else 0.06)


def other_branch(packed, window):
    index = torch.arange(packed.length)
    return ((packed.groups[:, None] == packed.groups) & (index[:, None] >= index))[None, None]


def positions_off_by_one(rows):
    packed = pack_pairs(rows)
    moved = torch.where(packed.branches >= 0, packed.position_ids + 1, packed.position_ids)
    return packed._replace(position_ids=moved)


dense_mask, pack_pairs = attention.dense_mask, parity.pack_pairs
WRONG = {
    "other branch": other_branch,
    "no prefix": lambda packed, window: dense_mask(packed, window) & (packed.branches[:, None] == packed.branches),
    "positions": positions_off_by_one,
    "longer window": lambda packed, window: dense_mask(packed, window + 1),
    "shorter window": lambda packed, window: dense_mask(packed, window - 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_layouts_are_refused_in_every_precision(monkeypatch, four_layers, ours, wrong):
    shallow = four_layers(WINDOW if "window" in wrong else None)
    where, what = (parity, "pack_pairs") if wrong == "positions" else (attention, "dense_mask")
    monkeypatch.setattr(where, what, WRONG[wrong])
    with pytest.raises(ParityError, match=r"attention: dense scores .*ForCausalLM differently from a plain forward"):
        check(shallow, ours, "dense")


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("kind", ["segment", "dense", "flex"])
def test_small_models_pass_in_float32(name, kind):
    model = make_model(name).eval()
    assert check_parity(model, model, make_pairs(9), kind) < 1e-5
    assert model.config._attn_implementation == attention.IMPLEMENTATIONS[kind]


@pytest.fixture
def compare(monkeypatch):
    """`check_parity` of given differences from the first plain kernel's log-probabilities and hidden states."""

    def compare(packed=0.0, other=0.0, packed_hidden=0.0, other_hidden=0.0, plain=-1.0, kind="segment"):
        calls = []

        def scored(logps, hidden):
            def score(model, unwrapped, rows, *options):
                calls.append((len(rows), torch.is_grad_enabled()))
                return parity.Scores(plain + torch.zeros(100) + logps, torch.tensor([1.0, -3.0]) + hidden)

            return score

        kernels = {"sdpa": scored(0.0, 0.0), "eager": scored(other, other_hidden)}
        monkeypatch.setattr(attention, "attach", lambda *arguments: None)
        monkeypatch.setattr(parity, "_plain", lambda *arguments: kernels[arguments[-1]](*arguments))
        monkeypatch.setattr(parity, "_packed", scored(packed, packed_hidden))
        try:
            return check_parity(None, make_model("llama"), make_pairs(20), kind)
        finally:
            assert calls == [(8, False)] * 3

    return compare


NOISE = torch.tensor([0.015, -0.015, 0.005, -0.005]).repeat(25)  # 0.01 on average


def test_a_shift_of_all_scores_is_refused_where_noise_of_its_size_is_not(compare):
    noise = torch.tensor([0.032, -0.032, 0.024, -0.024]).repeat(25)
    assert compare(noise, NOISE) == pytest.approx(0.028)
    for shift in (-0.00545, 0.00545):
        assert compare(shift, NOISE) == pytest.approx(0.00545, abs=1e-6)
    for shift in (-0.00556, 0.00556):
        with pytest.raises(ParityError, match=r": mean signed .* token 5.6e-03, expected at most 5.5e-03\."):
            compare(shift, NOISE)


def test_differences_are_refused_beyond_what_plain_kernels_or_float32_allow(compare):
    with pytest.raises(ParityError, match=r": mean difference .* token 3.1e-02, expected at most 3.0e-02\. Set"):
        compare(torch.tensor([0.06, -0.06, 0.002, -0.002]).repeat(25), NOISE)
    away = torch.tensor([0.02, -0.02])  # of 2 on average
    compare(packed_hidden=away.flip(0), other_hidden=away)
    with pytest.raises(ParityError, match=r": relative .* hidden states .* 1.1e-02, expected at most 1.0e-02\. Set"):
        compare(packed_hidden=1.1 * away, other_hidden=away)
    assert compare(9e-5, packed_hidden=1.8e-4) == pytest.approx(9e-5, abs=1e-6)
    limit = "expected at most 1.0e-04"
    expected = rf"token 1.2e-04, {limit}; mean signed .* token 1.2e-04, {limit}; relative .* layer 1.1e-04, {limit}\. "
    for kind, way_out in (("segment", "Set `attention"), ("flex", "Set `attention"), ("dense", "This model can't")):
        with pytest.raises(ParityError, match=f"attention: {kind} scores LlamaForCausalLM .*{expected}{way_out}"):
            compare(1.2e-4, packed_hidden=2.2e-4, kind=kind)
    assert issubclass(ParityError, UserError)


def test_the_model_is_called_through_its_wrapper():
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, []

        def forward(self, **inputs):
            self.calls.append((self.model.config._attn_implementation, inputs["use_cache"]))
            return self.model(**inputs)

    wrapper = Wrapper(make_model("llama").eval())
    check_parity(wrapper, wrapper.model, make_pairs(2), "segment")
    assert wrapper.calls == [(name, False) for name in ("sdpa", "eager", "rmipo_segment", "rmipo_segment")]


@pytest.mark.parametrize("make", [MistralConfig, lambda: Gemma3Config(text_config={}, vision_config={})])
def test_hidden_states_are_those_behind_the_first_layer_of_each_kind(make):
    states = [torch.full((1, 2, 1), float(number), dtype=torch.bfloat16) for number in range(5)]  # first the embeddings
    output = types.SimpleNamespace(hidden_states=states)
    for layer_types, expected in ((None, [1]), (["sliding_attention"] * 2 + ["full_attention"] * 2, [1, 3])):
        config = make()
        config.get_text_config().layer_types = layer_types
        hidden = parity._behind_first_layers(output, config)
        assert hidden[0, 0].tolist() == expected and hidden.dtype == torch.float32


def test_as_many_pairs_as_the_limits_allow():
    def ids(prompt, chosen, rejected):
        return {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}

    assert [len(first_rows([ids(10, 5, 7)] * count)) for count in (1, 7, 8, 20)] == [1, 7, 8, 8]
    assert len(first_rows([ids(2000, 5, 3000)] * 3)) == 1
    assert [len(first_rows([sides] * 3)) for sides in (ids(500, 10, 1500), ids(500, 1500, 10))] == [1, 1]
    assert [len(first_rows([ids(500, 10, last)] * 20)) for last in (12, 13)] == [4, 3]  # 8 sequences of 512 or less
    assert len(first_rows([ids(10, 5, 7), ids(10, 5, 7), ids(3000, 9, 9)])) == 2
