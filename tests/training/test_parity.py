"""The check at start-up, with real pretrained weights: right layouts pass in every precision, wrong ones are refused."""

import contextlib
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from rmipo.training import attention, scoring
from rmipo.training.scoring import ParityError, check_parity
from tests.helpers.rows import user
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
def ours(smollm2):
    tokenizer, rows = AutoTokenizer.from_pretrained(smollm2), []
    for question, *answers in OURS:
        prompt = tokenizer.apply_chat_template([user(question)], add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text).input_ids for text in (prompt, *(f"{answer}<|im_end|>" for answer in answers))]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    return rows


def check(pretrained, rows, kind):
    model, precision = pretrained
    attention.attach(model, kind)
    with autocast(precision):
        difference = check_parity(model, model, rows, kind)
    assert model.config._attn_implementation == attention.IMPLEMENTATIONS[kind]
    return difference


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


dense_mask, pack_pairs = attention.dense_mask, scoring.pack_pairs
WRONG = {
    "other branch": other_branch,
    "no prefix": lambda packed, window: dense_mask(packed, window) & (packed.branches[:, None] == packed.branches),
    "positions": positions_off_by_one,
    "longer window": lambda packed, window: dense_mask(packed, window + 1),
    "shorter window": lambda packed, window: dense_mask(packed, window - 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_layouts_are_refused(monkeypatch, four_layers, ours, wrong):
    """Between weights in bfloat16 positions that are off by one drown in the rounding."""
    shallow = four_layers(WINDOW if "window" in wrong else None)
    if shallow[1] == "bfloat16" and wrong not in ("other branch", "no prefix"):
        return
    where, what = (scoring, "pack_pairs") if wrong == "positions" else (attention, "dense_mask")
    monkeypatch.setattr(where, what, WRONG[wrong])
    with pytest.raises(ParityError, match=r"attention: dense scores .*ForCausalLM differently from a plain forward"):
        check(shallow, ours, "dense")


def test_scores_that_are_not_finite_are_refused():
    model = make_model().eval()
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(ParityError):
        check_parity(model, model, make_pairs(2), "segment")
