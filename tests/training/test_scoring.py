"""Packed, prefix-shared scoring against the padded reference: log-probabilities, loss and gradients."""

import pytest
import torch
import torch.nn.functional as F

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
