"""Packed, prefix-shared scoring: layouts, masks, log-probabilities; the attention functions, and what chooses them."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE

from rmipo.training import attention, scoring
from rmipo.training.packing import concatenate, pack, pack_pairs, pack_priors
from tests.helpers.small_models import make_model, make_pairs
from tests.references.padded import padded_pairs


def test_layouts_of_a_pair_and_of_priors():
    packed = pack_pairs([{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}])
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.shift_labels.tolist() == [[-100, -100, 4, 5, 6]]
    assert packed.scored.tolist() == [2, 3, 4] and packed.labels.tolist() == [4, 5, 6]
    assert packed.owner.tolist() == [0, 0, 1]
    assert packed.segments == ((0, 2, 2, 2), (0, 2, 4, 1))
    assert packed.groups.tolist() == [0] * 5 and packed.branches.tolist() == [-1, -1, 2, 2, 4]
    assert (packed.length, packed.num_responses) == (5, 2)
    pair = {"prompt_ids": [9], "chosen_ids": [4, 5], "rejected_ids": [6]}
    shared = pack_priors([pair], [1, 2])
    assert shared.input_ids.tolist() == [[1, 2, 4, 2]]
    assert shared.labels.tolist() == [4, 5, 6]
    release = pack_priors([pair], [])
    assert release.input_ids.tolist() == [[4]] and release.labels.tolist() == [5]
    assert release.num_responses == 2
    assert release.response_lengths.tolist() == [1.0, 0.0]


def without_context(pairs):
    return pack_priors([{**pairs[0], "chosen_ids": [7]}, *pairs[1:]], [])


@pytest.mark.parametrize("make", [pack_pairs, without_context])
def test_concatenated_sequences_equal_those_packed_together(make):
    pairs = [{**pair, "chosen_ids": [7]} if i in (0, 2, 3) else pair for i, pair in enumerate(make_pairs(5))]
    joined = concatenate([make(pairs[:2]), make(pairs[2:3]), make(pairs[3:])])
    together = make(pairs)
    assert (0 in together.response_lengths) == (make is without_context)
    for name, value in together._asdict().items():
        other = getattr(joined, name)
        assert torch.equal(other, value) if torch.is_tensor(value) else other == value, name


@pytest.mark.parametrize("window", [None, 40])
def test_flex_block_mask_covers_the_dense_mask(window):
    parts = [pack_pairs(make_pairs(12, seed=1, prompt_lengths=(1, 150))), pack([([1, 2], [[3], [], [4] * 300])])]
    packed = concatenate(parts).padded(attention.BLOCK)
    dense = attention.dense_mask(packed, window)[0, 0]
    mask = attention.block_mask(packed, window)
    index = torch.arange(len(dense))
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None, :]), dense)
    assert mask.seq_lengths == (len(dense), len(dense))
    blocks = mask.to_dense()[0, 0].bool()
    per_block = dense.view(len(blocks), attention.BLOCK, len(blocks), attention.BLOCK).any(3).any(1)
    assert not (per_block & ~blocks).any(), "no block that holds something may be skipped"
    lower_triangle = len(blocks) * (len(blocks) + 1) // 2
    assert len(blocks) >= 10 and blocks.sum() < 0.6 * lower_triangle, "empty blocks are skipped"


def test_padding_has_no_part_in_the_scores():
    packed = pack_pairs(make_pairs(2))
    padded = packed.padded(64)
    length = packed.length
    assert padded.input_ids.shape == padded.shift_labels.shape == (1, 64)
    assert torch.equal(padded.shift_labels[:, :length], packed.shift_labels)
    assert (padded.shift_labels[:, length:] == -100).all()
    # A model with learned positions looks them up, too.
    assert not padded.input_ids[:, length:].any() and not padded.position_ids[:, length:].any()
    mask = attention.dense_mask(padded, None)[0, 0]
    assert not mask[:length, length:].any() and not mask[length:, :length].any()
    assert mask.diagonal().all(), "a position that sees nothing would be NaN"
    assert padded.padded(64).length == 64


def test_the_head_runs_at_response_positions_and_no_keys_are_kept():
    """All logits of a long sequence would not fit."""
    model, pairs = make_model(), make_pairs(3)
    found = []
    model.register_forward_hook(lambda module, args, output: found.append((output.logits, output.past_key_values)))
    scoring.score_pairs(model, [pairs])
    ((logits, cache),) = found
    assert logits.shape[1] == sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    assert cache is None


def test_pairs_are_scored_without_dropout_and_a_model_is_left_plain_where_that_fails():
    """As in the middle of a training."""
    model, pairs = make_model(), make_pairs(3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        expected = padded_pairs(model.eval(), pairs)
    actual = scoring.score_pairs(model.train(), [pairs])
    torch.testing.assert_close(actual["chosen_logps"], expected["chosen_logps"].float(), atol=1e-4, rtol=0)
    with pytest.raises(IndexError):
        scoring.score_pairs(model, [[{"prompt_ids": [1], "chosen_ids": [61], "rejected_ids": [2, 61, 3]}]])
    assert model.config._attn_implementation == "sdpa"


def test_sums_and_logits_of_any_size_stay_right():
    packed = pack([([0], [[1] * 30000])])
    values = torch.full((30000,), -0.1, dtype=torch.float32)
    exact = float(values.double().sum())
    assert packed.sum_by_response(values).item() == pytest.approx(exact, rel=1e-7)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    actual = scoring.label_logps(logits * 1.0, torch.tensor([1, 2]))
    actual.sum().backward()
    assert actual.tolist() == pytest.approx([-2e4, -1.0986123])
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_values_and_gradients_equal_cross_entropy(monkeypatch, dtype, tolerance, rows, chunk):
    monkeypatch.setitem(scoring.CHUNK, "cpu", chunk)
    torch.manual_seed(rows)
    leaf = (5 * torch.randn(rows, 101)).to(dtype)
    labels, weights = torch.randint(0, 101, (rows,)), torch.randn(rows)

    expected_leaf = leaf.clone().requires_grad_()
    expected = -F.cross_entropy(expected_leaf.float(), labels, reduction="none")
    (expected * weights).sum().backward()
    actual_leaf = leaf.clone().requires_grad_()
    actual = scoring.label_logps(actual_leaf * 1.0, labels)
    (actual * weights).sum().backward()

    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual_leaf.grad, expected_leaf.grad, atol=tolerance, rtol=tolerance)
    assert rows == 0 or actual_leaf.grad.abs().max() > 1e-3


def test_a_backward_takes_the_place_of_the_logits_and_is_the_only_one():
    leaf = torch.randn(3, 5, requires_grad=True)
    logits = leaf * 1.0
    labels = torch.tensor([0, 1, 2])
    expected = F.one_hot(labels, 5) - logits.detach().softmax(-1)
    places = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    scoring.label_logps(logits, labels).sum().backward()
    torch.testing.assert_close(logits.detach(), expected)
    assert places == [logits.data_ptr()]
    loss = (scoring.label_logps(leaf * 1.0, torch.tensor([0, 1, 2])) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
