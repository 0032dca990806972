"""Scores of pairs for the objectives: two cases by hand, and random ones."""

import random
from typing import NamedTuple

import torch

from rmipo.objectives import PairScores


class Response(NamedTuple):
    """Log-probabilities per token: given the prompt, given no prompt, and under the reference."""

    cond: tuple[float, ...]
    uncond: tuple[float, ...]
    ref: tuple[float, ...]


# One pair per case; A: all signals agree, B: an inverted pair (delta_pmi < 0, KL < 0).
CASES = {
    "A": (
        Response(cond=(-0.5, -0.3, -0.4), uncond=(-1.5, -0.9, -0.6), ref=(-0.6, -0.5, -0.4)),
        Response(cond=(-1.0, -0.6), uncond=(-1.4, -1.0), ref=(-0.7, -0.5)),
        (0.4, -0.2),
    ),
    "B": (
        Response(cond=(-0.9, -1.1, -0.7, -1.3), uncond=(-1.3, -1.2, -0.8, -1.5), ref=(-0.8, -1.0, -0.7, -1.1)),
        Response(cond=(-0.4, -0.6), uncond=(-1.0, -0.9), ref=(-0.6, -0.6)),
        (-0.6, -0.2),
    ),
}


def scores_of(pairs, kl_log_ratios=None, prior_from: int = 0, dtype=torch.float64) -> PairScores:
    """Scores of (chosen, rejected) responses; `prior_from=1` leaves the first token of log pi(y) unscored."""

    def column(value):
        return torch.tensor([[value(chosen), value(rejected)] for chosen, rejected in pairs], dtype=dtype).unbind(1)

    kl = torch.tensor(kl_log_ratios or [(0.0, 0.0)] * len(pairs), dtype=dtype)
    chosen, rejected = column(lambda y: sum(y.cond))
    ref_chosen, ref_rejected = column(lambda y: sum(y.ref))
    # Policies perturbed away from the reference, and towards it, move the pair as the policy has moved it.
    moved = 0.02 * (chosen - ref_chosen - rejected + ref_rejected)
    return PairScores(
        chosen,
        rejected,
        *column(lambda y: len(y.cond)),
        *column(lambda y: sum(y.uncond[prior_from:])),
        ref_chosen,
        ref_rejected,
        mismatched_chosen_logps=kl[:, 0] - 5,
        mismatched_rejected_logps=kl[:, 1] - 5,
        ref_mismatched_chosen_logps=torch.full_like(kl[:, 0], -5),
        ref_mismatched_rejected_logps=torch.full_like(kl[:, 1], -5),
        plus_logratios=chosen - rejected + moved,
        minus_logratios=chosen - rejected - moved,
    )


def case_scores(case: str, **options) -> PairScores:
    chosen, rejected, kl = CASES[case]
    return scores_of([(chosen, rejected)], [kl], **options)


def settled(mean: float, std: float) -> dict[str, torch.Tensor]:
    """Gap statistics after so many micro-steps that the bias correction is 1."""
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in (("gap_mean", mean), ("gap_std", std), ("steps", 1e6))}


def batch(count=5, dtype=torch.float64) -> tuple[list[tuple[Response, Response]], PairScores]:
    """Random pairs and their scores."""
    draw = random.Random(0)

    def response():
        length = draw.randint(1, 6)
        return Response(*(tuple(draw.uniform(-2.5, -0.05) for _ in range(length)) for _ in range(3)))

    pairs, draw = [(response(), response()) for _ in range(count)], random.Random(1)
    kl = [(draw.uniform(-1, 2), draw.uniform(-1, 2)) for _ in pairs]
    return pairs, scores_of(pairs, kl, dtype=dtype)
