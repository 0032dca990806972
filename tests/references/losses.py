"""The objectives of Table 4, once more: one pair at a time, plain Python floats, from per-token log-probs.

Written from the formulas alone; nothing here imports the library, so agreement with it means something.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """Per-token log-probs of one response: given the prompt, given no prompt, and under the reference."""

    cond: tuple[float, ...]
    uncond: tuple[float, ...]
    ref: tuple[float, ...]


def nls(z: float) -> float:
    return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def log_ratio(y: Response, per_token: bool = False) -> float:
    reduce = mean if per_token else sum
    return reduce(p - q for p, q in zip(y.cond, y.ref, strict=True))


def dpo(chosen: Response, rejected: Response, beta: float) -> float:
    return nls(beta * (log_ratio(chosen) - log_ratio(rejected)))


def slic(chosen: Response, rejected: Response, delta: float, sft_weight: float) -> float:
    return max(0.0, delta - sum(chosen.cond) + sum(rejected.cond)) - sft_weight * sum(chosen.cond)


def ipo(chosen: Response, rejected: Response, tau: float) -> float:
    return (log_ratio(chosen, True) - log_ratio(rejected, True) - 1 / (2 * tau)) ** 2


def cpo(pairs: list[tuple[Response, Response]], beta: float, sft_weight: float) -> float:
    """Of a whole micro-batch: its NLL is a mean over all chosen tokens."""
    preference = mean(nls(beta * (sum(chosen.cond) - sum(rejected.cond))) for chosen, rejected in pairs)
    return preference - sft_weight * mean(token for chosen, _ in pairs for token in chosen.cond)


def kto(pairs: list[tuple[Response, Response]], kl_log_ratios: list[float], beta: float, weights) -> float:
    """Of a whole micro-batch, over its 2B examples; `weights` are those of (chosen, rejected)."""

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    z = beta * max(0.0, mean(kl_log_ratios))
    desirable = [weights[0] * (1 - sigmoid(beta * log_ratio(chosen) - z)) for chosen, _ in pairs]
    undesirable = [weights[1] * (1 - sigmoid(z - beta * log_ratio(rejected))) for _, rejected in pairs]
    return mean(desirable + undesirable)


def simpo(chosen: Response, rejected: Response, beta: float, gamma: float) -> float:
    return nls(beta * (mean(chosen.cond) - mean(rejected.cond)) - gamma)


def simper(chosen: Response, rejected: Response) -> float:
    return math.exp(mean(rejected.cond)) - math.exp(mean(chosen.cond))


def rmipo(chosen: Response, rejected: Response, beta: float, gamma_min: float, gamma_max: float) -> float:
    def pmi(y: Response) -> float:
        return mean(p - q for p, q in zip(y.cond, y.uncond, strict=True))

    gamma = gamma_min + (gamma_max - gamma_min) * math.exp(-max(0.0, pmi(chosen) - pmi(rejected)))
    return nls(beta * (mean(chosen.cond) - mean(rejected.cond)) - gamma)


def perturbed_logp(
    logits: list[list[float]], ref_logits: list[list[float]], tokens: list[int], epsilon: float
) -> float:
    """Summed log-prob of `tokens` under softmax((1 + epsilon) * logits - epsilon * ref_logits)."""
    total = 0.0
    for z, z_ref, token in zip(logits, ref_logits, tokens, strict=True):
        perturbed = [(1 + epsilon) * a - epsilon * b for a, b in zip(z, z_ref, strict=True)]
        total += perturbed[token] - math.log(sum(math.exp(v) for v in perturbed))
    return total
