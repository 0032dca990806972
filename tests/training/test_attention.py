"""The attention functions by themselves, and what chooses them."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE

from rmipo.training import attention
from rmipo.training.packing import pack
from tests.helpers.small_models import make_model

LAYER = types.SimpleNamespace()
PACKED = pack(
    [([1, 2, 3, 4], [[5, 6, 7, 8, 9], [], [5, 6]]), ([1], [[2, 3, 4]]), ([1, 2], [[3], [4], [5, 6]]), ([7, 8], [[9]])]
)


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, number, PACKED.length, 8, generator=generator) for number in (6, 2, 2)]


def expected_output(query, key, value, window=None, scale=None):
    """Head by head, position by position."""
    out = torch.zeros(1, query.shape[2], query.shape[1], 8)
    for head, position in itertools.product(range(query.shape[1]), range(query.shape[2])):
        seen = [
            other
            for other in range(position + 1)
            if PACKED.groups[other] == PACKED.groups[position]
            and PACKED.branches[other] in (-1, PACKED.branches[position])
            and (window is None or PACKED.position_ids[0, position] - PACKED.position_ids[0, other] < window)
        ]
        keys, values = (tensor[0, head // 3, seen] for tensor in (key, value))
        weights = torch.softmax(keys @ query[0, head, position] * (8**-0.5 if scale is None else scale), dim=0)
        out[0, position, head] = weights @ values
    return out


def run(kind, heads, window=None, **options):
    if kind == "segment":
        out, _ = attention.segment_attention(
            LAYER, *heads, None, segments=PACKED.segments, sliding_window=window, **options
        )
        return out
    mask = attention.block_mask(PACKED.padded(attention.BLOCK), window)
    padded = [F.pad(tensor, (0, 0, 0, attention.BLOCK - PACKED.length)) for tensor in heads]
    out, _ = attention.packed_flex_attention(LAYER, *padded, mask, **options)
    assert out.is_contiguous()
    return out[:, : PACKED.length]


@pytest.mark.parametrize("kind", ["segment", "flex"])
@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_positions_see_their_prefix_and_their_branch(kind, window, heads):
    for scale in (None, 0.7):
        torch.testing.assert_close(run(kind, heads, window, scaling=scale), expected_output(*heads, window, scale))
    layer = types.SimpleNamespace(sliding_window=window)  # which only the layer knows
    out, _ = attention.segment_attention(layer, *heads, None, segments=PACKED.segments)
    torch.testing.assert_close(out, expected_output(*heads, window))


def test_flex_shares_keys_among_a_power_of_two_of_heads_alone(heads, monkeypatch):
    calls = []

    def flex(query, key, value, **options):
        calls.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    attend = attention.flex_attention
    monkeypatch.setattr(attention, "flex_attention", flex)
    for number in (6, 4, 2):
        run("flex", [heads[0][:, :number], *heads[1:]])
    assert calls == [(6, 6, False), (2, 2, True), (2, 2, True)]
    assert attention._compiled_flex_attention.cache_info().currsize == 0  # compiling on a CPU takes a minute


def test_segments_have_to_tile_the_sequence(heads):
    first, second, third, *rest = PACKED.segments
    moved = (first._replace(start=first.start + 1), second, third, *rest)
    for wrong in (None, (second, third, *rest), moved, (*rest, first, second, third)):
        with pytest.raises(AssertionError, match=None if wrong else "packed sequences only; attach"):
            attention.segment_attention(LAYER, *heads, None, segments=wrong)


def test_auto_is_flex_on_cuda_compiled_once_and_segment_elsewhere(monkeypatch):
    assert attention.resolve_kind("auto", torch.device("cuda")) == "flex"
    assert {attention.resolve_kind("auto", torch.device(device)) for device in ("cpu", "mps")} == {"segment"}
    for kind in ("segment", "flex", "dense"):
        assert attention.resolve_kind(kind, torch.device("cpu")) == kind
    assert attention.BLOCK == _DEFAULT_SPARSE_BLOCK_SIZE  # which the kernels are made for
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    attention._compiled_flex_attention.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        assert attention._compiled_flex_attention() is attention._compiled_flex_attention() is attention.flex_attention
        # Eight graphs of Gemma 3, and never attention that is not compiled.
        assert torch._dynamo.config.recompile_limit > 8 and torch._dynamo.config.fail_on_recompile_limit_hit
    attention._compiled_flex_attention.cache_clear()
    assert compiled == [{"dynamic": True}]


def test_a_model_gets_one_fused_head_and_deepspeed_is_told_of_its_weight():
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    plain, adapted = make_model(), get_peft_model(make_model(), adapter)
    for model, base in ((plain, plain), (adapted, adapted.get_base_model())):
        attention.attach(model, "segment")
        attention.register_fused_head(model)
        assert not hasattr(base, "_external_params")
        plain_forward = base.forward
        attention.attach(model, "flex")
        fused_forward = base.forward
        for kind in ("plain", "flex"):  # a second time no second head
            attention.attach(model, kind)
        assert base.forward == fused_forward != plain_forward
        attention.register_fused_head(model)
        assert [id(weight) for weight in base._external_params.values()] == [id(base.lm_head.weight)]
