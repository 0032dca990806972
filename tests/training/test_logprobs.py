"""Log-probabilities of labels against cross-entropy: values, gradients, memory, one backward only."""

import pytest
import torch
import torch.nn.functional as F

from rmipo.training import scoring


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


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    actual = scoring.label_logps(logits * 1.0, torch.tensor([1, 2]))
    actual.sum().backward()
    assert actual.tolist() == pytest.approx([-2e4, -1.0986123])
    assert logits.grad.isfinite().all()


def test_a_second_backward_is_refused():
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = scoring.label_logps(leaf * 1.0, torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_takes_the_place_of_the_logits():
    leaf = torch.randn(3, 5, requires_grad=True)
    logits = leaf * 1.0
    labels = torch.tensor([0, 1, 2])
    expected = F.one_hot(labels, 5) - logits.detach().softmax(-1)
    places = []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    scoring.label_logps(logits, labels).sum().backward()
    torch.testing.assert_close(logits.detach(), expected)
    assert places == [logits.data_ptr()]


def test_a_gradient_of_the_gradient_is_refused():
    """It would be that of a constant."""
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = (scoring.label_logps(leaf * 1.0, torch.tensor([0, 1, 2])) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
