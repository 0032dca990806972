"""The margin of RMiPO: pointwise mutual information, its difference over a pair, and the schedules of gamma.

Pure functions of tensors. Equation, algorithm and table numbers are those of the paper. All logarithms are natural.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def pmi(
    logps: Tensor, prior_logps: Tensor, lengths: Tensor | None = None, prior_lengths: Tensor | None = None
) -> Tensor:
    """PMI(y|x) = log pi(y|x) - log pi(y) (Sec. 3.1, Insight II).

    Args:
        logps: (pairs,) summed log pi(y|x) over the response tokens, in nats.
        prior_logps: (pairs,) summed log pi(y).
        lengths: (pairs,) tokens behind `logps`; when given, both terms become means per token, otherwise they are
            the sums of the printed formula. A length of zero counts as one.
        prior_lengths: (pairs,) tokens behind `prior_logps` where that differs, as in the released code.

    Returns:
        (pairs,) nats per token with `lengths`, nats per sequence without.
    """
    if lengths is None:
        return logps - prior_logps
    prior_lengths = lengths if prior_lengths is None else prior_lengths
    return logps / lengths.clamp(min=1) - prior_logps / prior_lengths.clamp(min=1)


def delta_pmi(chosen_pmi: Tensor, rejected_pmi: Tensor) -> Tensor:
    """Delta_pmi = PMI(y_w|x) - PMI(y_l|x), the signal of Eq. 7."""
    return chosen_pmi - rejected_pmi


# Table 7. Each maps the rectified signal d = max(0, signal) to the share of (gamma_max - gamma_min) that is kept:
# 1 at d = 0, falling to 0. `span` is the d at which linear and cosine reach 0; the others do not read it.
SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "exponential": lambda d, span: torch.exp(-d),
    "linear": lambda d, span: 1 - (d / span).clamp(max=1),
    "cosine": lambda d, span: (1 + torch.cos(math.pi * (d / span).clamp(max=1))) / 2,
    "constant": lambda d, span: torch.full_like(d, 0.5),  # Table 7 "w/o": the middle of the bounds
}


def scheduled_margin(
    signal: Tensor, gamma_min: float, gamma_max: float, schedule: str = "exponential", span: float = 2.0
) -> Tensor:
    """gamma = gamma_min + (gamma_max - gamma_min) * h(max(0, signal)) (Algorithm 1, line 10; Table 7 for other h).

    Args:
        signal: (pairs,) Delta_pmi, or the signal that an ablation puts in its place.
        gamma_min, gamma_max: the bounds; gamma is gamma_max for every signal <= 0.
        schedule: a key of `SCHEDULES`.
        span: the signal at which linear and cosine reach gamma_min.

    Returns:
        (pairs,) margins within [gamma_min, gamma_max].
    """
    kept = SCHEDULES[schedule](signal.clamp(min=0), span)
    return gamma_min + (gamma_max - gamma_min) * kept
