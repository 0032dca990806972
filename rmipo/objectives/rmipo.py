"""RMiPO: the margin and the loss as pure functions of tensors, then the objective that a recipe configures.

Equation and table numbers are the paper's. Every tensor has shape (pairs,). `*_logps` are sums over response tokens, in
nats; `*_lengths` are token counts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rmipo.objectives import base
from rmipo.objectives.base import PairScores, choice, flag, margin_loss, number


def pmi(
    logps: Tensor, prior_logps: Tensor, lengths: Tensor | None = None, prior_lengths: Tensor | None = None
) -> Tensor:
    """PMI(y|x) = log pi(y|x) - log pi(y) (Sec. 3.1, Insight II): nats per response, or per token with `lengths`.

    `prior_lengths`: tokens behind `prior_logps` where those are fewer. A length of 0 counts as 1.
    """
    if lengths is None:
        return logps - prior_logps
    prior_lengths = lengths if prior_lengths is None else prior_lengths
    return logps / lengths.clamp(min=1) - prior_logps / prior_lengths.clamp(min=1)


def delta_pmi(chosen_pmi: Tensor, rejected_pmi: Tensor) -> Tensor:
    """PMI(y_w|x) - PMI(y_l|x) (Eq. 7)."""
    return chosen_pmi - rejected_pmi


# Table 7: the share of (gamma_max - gamma_min) that is kept at d = max(0, delta_pmi). It is 1 at d = 0 and falls
# towards 0, which linear and cosine reach at d = span.
SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "exponential": lambda d, span: torch.exp(-d),
    "linear": lambda d, span: 1 - (d / span).clamp(max=1),
    "cosine": lambda d, span: (1 + torch.cos(math.pi * (d / span).clamp(max=1))) / 2,
    "constant": lambda d, span: torch.full_like(d, 0.5),  # Table 7, "w/o": the middle of the bounds
}


def scheduled_margin(signal: Tensor, gamma_min: float, gamma_max: float, schedule: str, span: float = 2.0) -> Tensor:
    """gamma: gamma_max where delta_pmi <= 0, falling towards gamma_min above (Algorithm 1, line 10; Table 7)."""
    kept = SCHEDULES[schedule](signal.clamp(min=0), span)
    return gamma_min + (gamma_max - gamma_min) * kept


def rmipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    prior_chosen_logps: Tensor,
    prior_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma_min: float = 0.3,
    gamma_max: float = 1.6,
    schedule: str = "exponential",
) -> tuple[Tensor, Tensor]:
    """Per-pair losses, whose mean is the loss of a batch, and the margins gamma.

    `prior_*_logps` are log pi(y), the responses scored without their prompts. The margin carries no gradient (App. B).
    """
    chosen_pmi = pmi(chosen_logps, prior_chosen_logps, chosen_lengths)
    rejected_pmi = pmi(rejected_logps, prior_rejected_logps, rejected_lengths)
    gamma = scheduled_margin(delta_pmi(chosen_pmi, rejected_pmi).detach(), gamma_min, gamma_max, schedule)
    reward_difference = beta * (chosen_logps / chosen_lengths) - beta * (rejected_logps / rejected_lengths)
    return margin_loss(reward_difference, gamma), gamma


@dataclass(frozen=True)
class RMiPO(base.Objective):
    """`rmipo_loss` with hyperparameters, diagnostics, and the switches of the paper's ablations.

    `pmi_normalization="sequence"`: Eq. 7 as printed, with sums. `fidelity="release"`: the authors' code, where beta
    multiplies the margin too, the assistant header belongs to the response, and log pi(y) has no BOS, so that a
    response's first token is not scored and its mean is over |y| - 1 tokens. Table 3: `signal="loglik"` puts A_w - A_l
    in the place of delta_pmi (Eq. 6), `target="beta"` modulates beta. `length_normalization=False`: beta times the sums.
    """

    name = "rmipo"
    hints: ClassVar[dict[str, str]] = dict.fromkeys(("gamma", "gamma_beta_ratio"), "use gamma_min and gamma_max")

    beta: float = number(2.0)
    gamma_min: float = number(0.3, open_low=False)
    gamma_max: float = number(1.6)
    schedule: str = choice(*SCHEDULES)
    span: float = number(2.0)
    pmi_normalization: str = choice("token", "sequence")
    prior_context: str = choice("header", "bos", "none")  # what log pi(y) is conditioned on
    prior_model: str = choice("policy", "initial")  # whose log pi(y); that of the initial policy is scored only once
    length_normalization: bool = flag(True)
    fidelity: str = choice("paper", "release")
    signal: str = choice("pmi", "loglik")
    target: str = choice("gamma", "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fidelity == "release":
            object.__setattr__(self, "prior_context", "none")

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        if problems := super().problems(values):
            return problems
        low, high = values["gamma_min"], values["gamma_max"]
        problems = [f"objective.gamma_min is {low}: expected at most gamma_max, which is {high}"] * (low > high)
        excluded = {"paper": ["none"], "release": ["bos", "sequence"]}[values["fidelity"]]
        wrong = [key for key in ("prior_context", "pmi_normalization") if values[key] in excluded]
        ending = f"not with fidelity {values['fidelity']!r}; remove it"
        return problems + [f"objective.{key} is {values[key]!r}: {ending}" for key in wrong]

    @property
    def needs(self) -> frozenset[str]:
        prior = {"policy": "prior", "initial": "initial_prior"}[self.prior_model]
        return frozenset({prior} if self.signal == "pmi" and self.schedule != "constant" else ())

    @property
    def header_in_response(self) -> bool:
        return self.fidelity == "release"

    def __call__(self, scores: PairScores, state: base.State | None = None) -> base.ObjectiveOutput:
        chosen_rewards, rejected_rewards = (self.beta * logps for logps in scores.logps(self.length_normalization))
        reward_difference = chosen_rewards - rejected_rewards  # of Eq. 8
        diagnostics = self._pmi(scores) if self.needs else {}
        signal = diagnostics.get("delta_pmi", torch.sub(*scores.logps(per_token=True)))
        gamma = scheduled_margin(signal.detach(), self.gamma_min, self.gamma_max, self.schedule, self.span)
        if self.target == "beta":  # Table 3 without GM: the same modulation, relative to the middle of the bounds
            middle = torch.full_like(gamma, (self.gamma_min + self.gamma_max) / 2)
            reward_difference, gamma = reward_difference * gamma / middle, middle
        losses = margin_loss(reward_difference, gamma * self.beta if self.fidelity == "release" else gamma)
        return base.make_output(losses, chosen_rewards, rejected_rewards, gamma, **diagnostics)

    def _pmi(self, scores: PairScores) -> dict[str, Tensor]:
        def side(logps: Tensor, prior_logps: Tensor, lengths: Tensor) -> Tensor:
            prior_lengths = lengths - 1 if self.fidelity == "release" else lengths
            by_token = (lengths, prior_lengths) if self.pmi_normalization == "token" else ()
            return pmi(logps, prior_logps, *by_token)

        chosen = side(scores.chosen_logps, scores.prior_chosen_logps, scores.chosen_lengths)
        rejected = side(scores.rejected_logps, scores.prior_rejected_logps, scores.rejected_lengths)
        return {"pmi_chosen": chosen, "pmi_rejected": rejected, "delta_pmi": delta_pmi(chosen, rejected)}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        return base.summarize_margin(self.name, columns, self.gamma_min, self.gamma_max)
