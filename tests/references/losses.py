"""Objectives that no other library has, once more: one pair at a time, plain Python floats, from per-token log-probs.

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


def slic(chosen: Response, rejected: Response, delta: float, sft_weight: float) -> float:
    return max(0.0, delta - sum(chosen.cond) + sum(rejected.cond)) - sft_weight * sum(chosen.cond)


def simper(chosen: Response, rejected: Response) -> float:
    return math.exp(mean(rejected.cond)) - math.exp(mean(chosen.cond))


def rmipo(chosen: Response, rejected: Response, beta: float, gamma_min: float, gamma_max: float) -> float:
    def pmi(y: Response) -> float:
        return mean(p - q for p, q in zip(y.cond, y.uncond, strict=True))

    gamma = gamma_min + (gamma_max - gamma_min) * math.exp(-max(0.0, pmi(chosen) - pmi(rejected)))
    return nls(beta * (mean(chosen.cond) - mean(rejected.cond)) - gamma)
