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
    """-log sigmoid(z)."""
    return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def log_ratio(y: Response, per_token: bool = False) -> float:
    reduce = mean if per_token else sum
    return reduce(p - q for p, q in zip(y.cond, y.ref, strict=True))


def dpo(w: Response, l: Response, beta: float) -> float:  # noqa: E741
    return nls(beta * (log_ratio(w) - log_ratio(l)))


def slic(w: Response, l: Response, delta: float, sft_weight: float) -> float:  # noqa: E741
    return max(0.0, delta - sum(w.cond) + sum(l.cond)) - sft_weight * sum(w.cond)


def ipo(w: Response, l: Response, tau: float) -> float:  # noqa: E741
    return (log_ratio(w, True) - log_ratio(l, True) - 1 / (2 * tau)) ** 2


def cpo(pairs: list[tuple[Response, Response]], beta: float, sft_weight: float) -> float:
    """Of a whole micro-batch: its NLL is a mean over all chosen tokens."""
    preference = mean(nls(beta * (sum(w.cond) - sum(l.cond))) for w, l in pairs)
    return preference - sft_weight * mean(token for w, _ in pairs for token in w.cond)


def kto(pairs: list[tuple[Response, Response]], kl_log_ratios: list[float], beta: float, w_w: float, w_l: float) -> float:
    """Of a whole micro-batch, over its 2B examples."""
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    z = beta * max(0.0, mean(kl_log_ratios))
    chosen = [w_w * (1 - sigmoid(beta * log_ratio(w) - z)) for w, _ in pairs]
    rejected = [w_l * (1 - sigmoid(z - beta * log_ratio(l))) for _, l in pairs]
    return mean(chosen + rejected)


def simpo(w: Response, l: Response, beta: float, gamma: float) -> float:  # noqa: E741
    return nls(beta * (mean(w.cond) - mean(l.cond)) - gamma)


def simper(w: Response, l: Response) -> float:  # noqa: E741
    return math.exp(mean(l.cond)) - math.exp(mean(w.cond))


def rmipo(w: Response, l: Response, beta: float, gamma_min: float, gamma_max: float) -> float:  # noqa: E741
    def pmi(y: Response) -> float:
        return mean(p - q for p, q in zip(y.cond, y.uncond, strict=True))

    gamma = gamma_min + (gamma_max - gamma_min) * math.exp(-max(0.0, pmi(w) - pmi(l)))
    return nls(beta * (mean(w.cond) - mean(l.cond)) - gamma)


def epsilon_step(logits: list[list[float]], ref_logits: list[list[float]], tokens: list[int], epsilon: float) -> float:
    """Summed log-prob of `tokens` under softmax((1 + epsilon) * logits - epsilon * ref_logits)."""
    total = 0.0
    for z, z_ref, token in zip(logits, ref_logits, tokens, strict=True):
        perturbed = [(1 + epsilon) * a - epsilon * b for a, b in zip(z, z_ref, strict=True)]
        total += perturbed[token] - math.log(sum(math.exp(v) for v in perturbed))
    return total
