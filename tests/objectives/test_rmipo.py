"""PMI and the schedules of gamma, against hand-computed values."""

import math

import pytest
import torch

from rmipo.objectives.rmipo import SCHEDULES, delta_pmi, pmi, rmipo_loss, scheduled_margin


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_pmi_of_sequences_and_of_tokens():
    logps, prior, lengths = t(-1.2, -4.0), t(-3.0, -4.8), t(3, 4)
    torch.testing.assert_close(pmi(logps, prior), t(1.8, 0.8))
    torch.testing.assert_close(pmi(logps, prior, lengths), t(0.6, 0.2))
    torch.testing.assert_close(pmi(logps, prior, lengths, lengths - 1), t(-0.4 + 1.5, -1.0 + 1.6))
    torch.testing.assert_close(delta_pmi(t(0.6), t(0.4)), t(0.2))


def test_pmi_of_nothing_is_finite():
    torch.testing.assert_close(pmi(t(-0.5, 0.0), t(0.0, 0.0), t(1, 0), t(0, 0)), t(-0.5, 0.0))


@pytest.mark.parametrize(
    ("schedule", "expected"),  # the kept share of the range at d = 0, 0.5, 1, 2, 3 with span 2
    [
        ("exponential", [1, math.exp(-0.5), math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("linear", [1, 0.75, 0.5, 0, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
        ("constant", [0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_schedules(schedule, expected):
    gamma = scheduled_margin(t(0, 0.5, 1, 2, 3), 0.3, 1.6, schedule)
    torch.testing.assert_close(gamma, 0.3 + 1.3 * t(*expected))


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"constant"}))
def test_gamma_is_at_its_maximum_for_inverted_pairs_and_falls_within_its_bounds(schedule):
    signal = torch.linspace(-3, 10, 200, dtype=torch.float64)
    gamma = scheduled_margin(signal, 0.3, 1.6, schedule)
    torch.testing.assert_close(gamma[signal <= 0], torch.full_like(gamma[signal <= 0], 1.6))
    assert (gamma.diff() <= 0).all() and (gamma >= 0.3).all() and (gamma <= 1.6).all()
    assert gamma[-1].item() == pytest.approx(0.3, abs=1e-4)


def test_span_is_where_linear_and_cosine_reach_the_minimum():
    for schedule in ("linear", "cosine"):
        low, high = scheduled_margin(t(0.999, 1.0), 0.0, 1.0, schedule, span=1.0)
        assert low > 0 and high == 0


def test_span_is_nothing_to_exponential_and_constant():
    for schedule in ("exponential", "constant"):
        narrow, wide = (scheduled_margin(t(-1, 0.5, 3), 0.3, 1.6, schedule, span) for span in (1.0, 4.0))
        assert narrow.equal(wide)


def test_default_spans_compare_schedules_of_equal_mean():
    """Over Delta_pmi >= 0 the three decays keep the same area, so that Table 7 compares shapes, not mean margins."""
    d = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    for schedule in ("exponential", "linear", "cosine"):
        assert torch.trapezoid(scheduled_margin(d, 0, 1, schedule), d).item() == pytest.approx(1.0, abs=1e-6)


def test_loss_of_one_pair_by_hand():
    logps = [t(-6.0).requires_grad_(), t(-10.0).requires_grad_()]  # 3 and 4 tokens
    losses, gamma = rmipo_loss(*logps, t(-9.0), t(-12.0), t(3), t(4))
    margin = 0.3 + 1.3 * math.exp(-0.5)  # PMI: 1.0 and 0.5 nats per token
    difference = 2 * (-2.0 + 2.5) - margin
    torch.testing.assert_close(gamma, t(margin))
    torch.testing.assert_close(losses, t(math.log1p(math.exp(-difference))))
    losses.sum().backward()
    slope = -1 / (1 + math.exp(difference))  # of -log sigmoid; the margin has none
    torch.testing.assert_close(logps[0].grad, t(slope * 2 / 3))
    torch.testing.assert_close(logps[1].grad, t(-slope * 2 / 4))
