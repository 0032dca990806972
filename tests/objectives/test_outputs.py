"""What an objective gives beside its losses: columns per pair, their summary, its state; and its parts by hand."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rmipo.objectives import OBJECTIVES, PairScores, build_objective
from rmipo.objectives.rmipo import delta_pmi, pmi, rmipo_loss, scheduled_margin
from tests.helpers.pair_scores import batch, settled

STATES = {"alpha-dpo": (0.5, 0.25), "beta-dpo": (0.5, 0.25)}


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# Two pairs with log-ratios 3, 1 (chosen) and -1, 1 (rejected); one policy rises between the perturbed ones, one falls.
SCORES = PairScores(
    t(-4, -4),
    t(-6, -3),
    t(4, 2),
    t(3, 3),
    ref_chosen_logps=t(-7, -5),
    ref_rejected_logps=t(-5, -4),
    mismatched_chosen_logps=t(-4, -3),
    mismatched_rejected_logps=t(-5, -4),
    ref_mismatched_chosen_logps=t(-7, -2),
    ref_mismatched_rejected_logps=t(-6, -6),
    plus_logratios=t(2.5, -2),
    minus_logratios=t(1.5, 0),
)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"name": "slic", "sft_weight": 0.1}, {"nll": 4}),
        ({"name": "cpo", "sft_weight": 0.1}, {"nll": 8 / 6}),
        ({"name": "epsilon-dpo"}, {"beta": 0.01, "k_plus": 0.5, "k_minus": 0.5}),
        ({"name": "alpha-dpo", "alpha": 0.3}, {"gap_mean": 0.5, "gap_std": 0.25, "alpha_over_std": 1.2}),
        ({"name": "kto", "beta": 0.5}, {"z_ref": 0.5 * 1.25}),
        # (4 + 0) / 2 is the mean gap of the two pairs, of which none is left out without a draw.
        (
            {"name": "beta-dpo", "alpha": 0.4},
            {"gap_mean": 0.5, "gap_std": 0.25, "kept": 1, "beta": 0.1 * (1 + 0.4 * (2 - 0.5))},
        ),
        ({"name": "simpo"}, {}),
    ],
    ids=lambda value: value.get("name", ""),
)
def test_what_is_logged_is_the_mean_over_pairs(block, expected):
    objective = build_objective(block)
    state = settled(*STATES[objective.name]) if objective.name in STATES else None
    columns = objective(SCORES, state).diagnostics
    summary = objective.summarize(columns)
    assert summary == pytest.approx({f"{objective.name}/{key}": value for key, value in expected.items()})


def test_summaries_by_hand():
    columns = {"kept": t(1, 0, 1), "beta": t(1, 1, 4), "gap_mean": t(0, 0, 0), "gap_std": t(1, 1, 1)}
    summary = build_objective({"name": "beta-dpo"}).summarize(columns)
    assert summary["beta-dpo/kept"] == pytest.approx(2 / 3) and summary["beta-dpo/beta"] == 2
    columns = {"running_beta": t(0.1, 0.1, 0.1, 0.1), "k": t(1, 0, -1, -1)}
    summary = build_objective({"name": "epsilon-dpo"}).summarize(columns)
    assert (summary["epsilon-dpo/k_plus"], summary["epsilon-dpo/k_minus"]) == (0.25, 0.5)
    objective = build_objective({"name": "rmipo", "gamma_max": 1.4})
    # The share at the upper bound is as float32 rounds it; the lower one is only approached.
    gamma = torch.tensor([1.4, 1.4, 1.3999, 1.3, 0.32, 0.309, 0.305, 0.3])
    assert gamma[0].double() < 1.4
    summary = objective.summarize({"gamma": gamma})
    assert (summary["rmipo/gamma_at_max"], summary["rmipo/gamma_at_min"]) == (2 / 8, 3 / 8)
    # A correlation with equal values on either side would be NaN in every log line of such a batch: it is left out.
    columns = {"gamma": t(1, 1, 1), "delta_pmi": t(0.1, 0.2, 0.4), "pmi_chosen": t(1, 1, 1), "pmi_rejected": t(1, 1, 1)}
    columns |= {"chosen_lengths": t(3, 4, 5), "rejected_lengths": t(1, 2, 3)}
    objective = build_objective({"name": "rmipo"})
    assert "rmipo/corr_delta_pmi_length" not in objective.summarize(columns)
    columns["rejected_lengths"] = t(1, 2, 2)
    assert objective.summarize(columns)["rmipo/corr_delta_pmi_length"] == pytest.approx(0.944911)
    columns["delta_pmi"] = t(0.2, 0.2, 0.2)
    assert "rmipo/corr_delta_pmi_length" not in objective.summarize(columns)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_columns_are_detached_and_of_one_type(name):
    """The trainer stacks all columns of a micro-batch into one table and gathers that."""
    _, scores = batch(dtype=torch.float32)
    columns = {key: None if v is None else v.clone().requires_grad_("logps" in key) for key, v in vars(scores).items()}
    objective = build_objective({"name": name})
    state = objective.observe(objective.init_state(), PairScores(**columns))
    output = objective(PairScores(**columns), state or None)
    assert output.losses.requires_grad and output.losses.shape == (5,)
    found = {"chosen": output.chosen_rewards, "rejected": output.rejected_rewards, **output.diagnostics}
    found |= {} if output.gamma is None else {"gamma": output.gamma}
    for key, column in found.items():
        assert (column.shape, column.dtype, column.requires_grad) == ((5,), torch.float32, False), key
    after = objective.end_step(state, output.diagnostics)
    for states in (objective.init_state(), after):
        assert all((v.shape, v.dtype, v.requires_grad) == ((), torch.float64, False) for v in states.values())


def test_modulated_betas_empty_responses_and_gaps_of_sums():
    output = build_objective({"name": "rmipo", "signal": "loglik", "target": "beta"})(SCORES)
    assert (output.chosen_rewards.tolist(), output.rejected_rewards.tolist()) == ([-2, -4], [-4, -2])
    assert output.gamma.tolist() == pytest.approx([0.95, 0.95])
    scores = PairScores(t(0, -2), t(-2, 0), t(0, 4), t(4, 0))
    assert [value.tolist() for value in scores.logps(per_token=True)] == [[0, -0.5], [-0.5, 0]]
    scores = PairScores(t(0, 0), t(-2, -1), t(0, 0), t(4, 3))
    for normalization in ("token", "sequence"):
        block = {"name": "cpo", "sft_normalization": normalization}
        assert build_objective(block)(scores).diagnostics["nll"].tolist() == [0, 0]
    block = {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2, "length_normalization": False}
    output = build_objective(block)(SCORES, settled(0.5, 0.25))  # gaps 4 and 0: 14 and -2 deviations off
    assert output.gamma.tolist() == pytest.approx([2.5 * (0.6 + 0.2 * 14), 2.5 * (0.6 - 0.2 * 2)])
    state = build_objective(block).observe(build_objective(block).init_state(), SCORES)
    assert state["gap_mean"].item() == pytest.approx(0.1 * 2)


def gaps(*values):
    zeros = torch.zeros(len(values), dtype=torch.float64)
    ones = zeros + 1
    return PairScores(t(*values), zeros, ones, ones, ref_chosen_logps=zeros, ref_rejected_logps=zeros)


@pytest.mark.parametrize("name", ["alpha-dpo", "beta-dpo"])
def test_running_statistics(name):
    """The deviation is the unbiased one of each micro-batch, at least a millionth, and 0 of one pair: an epoch's rest."""
    objective = build_objective({"name": name})

    def statistics(pairs, state):
        columns = objective(pairs, {k: v for k, v in state.items() if not k.startswith("batch_")}).diagnostics
        return columns["gap_mean"][0].item(), columns["gap_std"][0].item()

    start = objective.init_state()  # an evaluation before the first step takes the statistics of its own pairs
    assert statistics(gaps(1, 3), start) == pytest.approx((2, 2**0.5))
    assert statistics(gaps(0, 1e-4), start)[1] == pytest.approx(1e-4 / 2**0.5)
    assert statistics(gaps(3, 3), start)[1] == pytest.approx(1e-6)
    state = objective.observe(start, gaps(1, 3))
    assert objective(gaps(1, 3), state).losses.equal(objective(gaps(1, 3)).losses)
    two = objective.observe(state, gaps(0, 6, 0, 6))  # deviations of sqrt(2) and sqrt(12)
    deviation = (0.9 * 0.1 * 2**0.5 + 0.1 * 12**0.5) / 0.19
    assert statistics(gaps(1, 2), two) == pytest.approx(((0.9 * 0.1 * 2 + 0.1 * 3) / 0.19, deviation))
    rest = objective.observe(state, gaps(7))
    assert rest["gap_mean"].item() == pytest.approx(0.9 * 0.1 * 2 + 0.1 * 7)
    assert rest["gap_std"].item() == pytest.approx(0.9 * 0.1 * 2**0.5)


def test_beta_dpo_selects_by_statistics_that_count_the_batch_itself():
    """Running mean 0 and deviation 1e-6 before it, 1 and 0.2 with it: the pair at 1 is the nearest, not the one at 0."""
    scores = gaps(0, 1, *[10.2, 10.4] * 24)
    objective = build_objective({"name": "beta-dpo", "rho": 0.98})
    for step in range(100):
        state = objective.observe(settled(0, 1e-6) | {"steps": t(1e6 + step)[0]}, scores)
        assert state["batch_kept"].nonzero().tolist() == [[1]]
    for gap, beta in ((-100, 1e-3), (100, 0.1 * (1 + 0.6 * 100))):
        output = build_objective({"name": "beta-dpo"})(gaps(gap, gap), settled(0, 1))
        assert output.diagnostics["beta"].tolist() == pytest.approx([beta] * 2)
    state = settled(0, 1) | {"batch_kept": torch.zeros(2, dtype=torch.bool), "batch_center": t(0.5)[0]}
    assert build_objective({"name": "beta-dpo"})(gaps(1, 2), state).losses.tolist() == [0, 0]


def test_pmi_and_losses_with_label_smoothing_and_sft_by_hand():
    logps, prior, lengths = t(-1.2, -4.0), t(-3.0, -4.8), t(3, 4)
    torch.testing.assert_close(pmi(logps, prior), t(1.8, 0.8))
    torch.testing.assert_close(pmi(logps, prior, lengths), t(0.6, 0.2))
    torch.testing.assert_close(pmi(logps, prior, lengths, lengths - 1), t(-0.4 + 1.5, -1.0 + 1.6))
    torch.testing.assert_close(delta_pmi(t(0.6), t(0.4)), t(0.2))
    torch.testing.assert_close(pmi(t(-0.5, 0.0), t(0.0, 0.0), t(1, 0), t(0, 0)), t(-0.5, 0.0))  # of nothing
    # beta 2: reward differences 2 and -2; gamma 0.3 + 1.3 / 2 = 0.95 and 1.6, so margins of 1.05 and -3.6.
    plain, flipped = -logsigmoid(t(1.05, -3.6)), -logsigmoid(t(-1.05, 3.6))
    losses, gamma = rmipo_loss(**PAIRS)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gamma, t(0.95, 1.6))
    torch.testing.assert_close(rmipo_loss(**PAIRS, label_smoothing=0.1)[0], 0.9 * plain + 0.1 * flipped)
    # 10 nats over the batch's 6 chosen tokens, of which 2 and 8 are the pairs'.
    torch.testing.assert_close(rmipo_loss(**PAIRS, sft_weight=0.5)[0], plain + 0.5 * t(2, 8) * 2 / 6)
    assert rmipo_loss(**PAIRS, sft_weight=0.5)[0].mean().item() == pytest.approx(plain.mean().item() + 0.5 * 10 / 6)


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


# Two pairs by hand: A_w = -1, -2; A_l = -2, -1; the first has delta_pmi ln 2, the second -1, with lengths 2, 4 and 3, 5.
PAIRS = {
    "chosen_logps": t(-2, -8),
    "rejected_logps": t(-6, -5),
    "prior_chosen_logps": t(-2 - 2 * math.log(2), -8),
    "prior_rejected_logps": t(-6, -10),
    "chosen_lengths": t(2, 4),
    "rejected_lengths": t(3, 5),
}


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


def test_the_objective_of_a_recipe_calls_the_function_and_simpo_takes_both_too():
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    scores = PairScores(**{name: PAIRS[name] for name in names})
    block = {"name": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2, "sft_weight": 3.0}
    objective = build_objective(block)
    plain, flipped = -logsigmoid(t(1.5, -2.5)), -logsigmoid(t(-1.5, 2.5))
    torch.testing.assert_close(objective(scores).losses, 0.8 * plain + 0.2 * flipped + 3 * t(2, 8) * 2 / 6)
    assert objective.micro_batch_matters and not build_objective({"name": "simpo"}).micro_batch_matters
    assert build_objective({"name": "rmipo", "sft_weight": 1e-3}).micro_batch_matters
    scores = PairScores(**PAIRS)
    for options in ({}, {"schedule": "cosine", "span": 1.0}, {"pmi_normalization": "sequence", "label_smoothing": 0.1}):
        losses, gamma = rmipo_loss(**PAIRS, **options)
        output = build_objective({"name": "rmipo", **options})(scores)
        assert torch.equal(output.losses, losses) and torch.equal(output.gamma, gamma.to(losses))
    losses, gamma = rmipo_loss(
        **PAIRS | {"prior_chosen_logps": None, "prior_rejected_logps": None}, schedule="constant"
    )
    torch.testing.assert_close(gamma, t(0.95, 0.95))
