"""PMI and the schedules of gamma, against hand-computed values."""

import math

import pytest
import torch

from rmipo.objectives import PairScores, build_objective
from rmipo.objectives.rmipo import delta_pmi, pmi, rmipo_loss, scheduled_margin


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_pmi_of_sequences_and_of_tokens():
    logps, prior, lengths = t(-1.2, -4.0), t(-3.0, -4.8), t(3, 4)
    torch.testing.assert_close(pmi(logps, prior), t(1.8, 0.8))
    torch.testing.assert_close(pmi(logps, prior, lengths), t(0.6, 0.2))
    torch.testing.assert_close(pmi(logps, prior, lengths, lengths - 1), t(-0.4 + 1.5, -1.0 + 1.6))
    torch.testing.assert_close(delta_pmi(t(0.6), t(0.4)), t(0.2))
    torch.testing.assert_close(pmi(t(-0.5, 0.0), t(0.0, 0.0), t(1, 0), t(0, 0)), t(-0.5, 0.0))  # of nothing


@pytest.mark.parametrize(
    ("schedule", "span", "expected"),  # the kept share of the range at d = -1, 0, 0.5, 1, 2, 3
    [
        ("exponential", {}, [1, 1, math.exp(-0.5), math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("exponential", {"span": 4.0}, [1, 1, math.exp(-0.5), math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("linear", {}, [1, 1, 0.75, 0.5, 0, 0]),
        ("linear", {"span": 1.0}, [1, 1, 0.5, 0, 0, 0]),
        ("cosine", {}, [1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
        ("cosine", {"span": 1.0}, [1, 1, 0.5, 0, 0, 0]),
        ("constant", {}, [0.5] * 6),
    ],
)
def test_schedules(schedule, span, expected):
    """With the default span, 2, the three decays keep the same area: Table 7 compares shapes, not mean margins."""
    gamma = scheduled_margin(t(-1, 0, 0.5, 1, 2, 3), 0.3, 1.6, schedule, **span)
    torch.testing.assert_close(gamma, 0.3 + 1.3 * t(*expected))


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


# Two pairs by hand: A_w = -1, -2; A_l = -2, -1; the first has delta_pmi ln 2, the second -1, with lengths 2, 4 and 3, 5.
PAIRS = {
    "chosen_logps": t(-2, -8),
    "rejected_logps": t(-6, -5),
    "prior_chosen_logps": t(-2 - 2 * math.log(2), -8),
    "prior_rejected_logps": t(-6, -10),
    "chosen_lengths": t(2, 4),
    "rejected_lengths": t(3, 5),
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_label_smoothing_and_sft_by_hand():
    """beta 2: reward differences 2 and -2; gamma 0.3 + 1.3 / 2 = 0.95 and 1.6, so margins of 1.05 and -3.6."""
    plain = t(-math.log(sigmoid(1.05)), -math.log(sigmoid(-3.6)))
    losses, gamma = rmipo_loss(**PAIRS)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gamma, t(0.95, 1.6))
    flipped = t(-math.log(sigmoid(-1.05)), -math.log(sigmoid(3.6)))
    torch.testing.assert_close(rmipo_loss(**PAIRS, label_smoothing=0.1)[0], 0.9 * plain + 0.1 * flipped)
    # 10 nats over the batch's 6 chosen tokens, of which 2 and 8 are the pairs'.
    torch.testing.assert_close(rmipo_loss(**PAIRS, sft_weight=0.5)[0], plain + 0.5 * t(2, 8) * 2 / 6)
    assert rmipo_loss(**PAIRS, sft_weight=0.5)[0].mean().item() == pytest.approx(plain.mean().item() + 0.5 * 10 / 6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma_min": 2.0}, {"beta": -1.0}, {"schedule": "exp"}, {"pmi_normalization": "tokens"}, {"fidelity": "Release"},
        {"signal": "loglikelihood"}, {"target": "Beta"}, {"label_smoothing": 0.7}, {"prior_chosen_logps": None},
    ],
)  # fmt: skip
def test_what_would_be_another_loss_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rmipo_loss(**PAIRS | wrong)


def test_simpo_takes_both_too():
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    scores = PairScores(**{name: PAIRS[name] for name in names})
    block = {"name": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2, "sft_weight": 3.0}
    objective = build_objective(block)
    plain = t(-math.log(sigmoid(1.5)), -math.log(sigmoid(-2.5)))
    flipped = t(-math.log(sigmoid(-1.5)), -math.log(sigmoid(2.5)))
    torch.testing.assert_close(objective(scores).losses, 0.8 * plain + 0.2 * flipped + 3 * t(2, 8) * 2 / 6)
    assert objective.micro_batch_matters and not build_objective({"name": "simpo"}).micro_batch_matters
    assert build_objective({"name": "rmipo", "sft_weight": 1e-3}).micro_batch_matters


def test_the_objective_of_a_recipe_calls_the_function():
    scores = PairScores(**PAIRS)
    for options in ({}, {"schedule": "cosine", "span": 1.0}, {"pmi_normalization": "sequence", "label_smoothing": 0.1}):
        losses, gamma = rmipo_loss(**PAIRS, **options)
        output = build_objective({"name": "rmipo", **options})(scores)
        assert torch.equal(output.losses, losses) and torch.equal(output.gamma, gamma.to(losses))
    losses, gamma = rmipo_loss(
        **PAIRS | {"prior_chosen_logps": None, "prior_rejected_logps": None}, schedule="constant"
    )
    torch.testing.assert_close(gamma, t(0.95, 0.95))
