"""RMiPO: the margin and the loss as pure functions of tensors, then the objective that a recipe configures.

Equation and table numbers are the paper's. Every tensor has shape (pairs,). `*_logps` are sums over response tokens, in
nats; `*_lengths` are token counts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from rmipo.objectives import base
from rmipo.objectives.base import Flag, NotNegative, PairScores, Positive, Smoothing, hyperparameters, margin_loss


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


def response_pmi(
    logps: Tensor, prior_logps: Tensor, lengths: Tensor, pmi_normalization: str = "token", fidelity: str = "paper"
) -> Tensor:
    """PMI(y|x) of one side of the pairs, in the reading that `RMiPO` describes."""
    if pmi_normalization == "sequence":
        return pmi(logps, prior_logps)
    # The released code scores log pi(y) without a context: the first token has no probability there.
    return pmi(logps, prior_logps, lengths, lengths - 1 if fidelity == "release" else lengths)


def rmipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    prior_chosen_logps: Tensor | None,
    prior_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma_min: float = 0.3,
    gamma_max: float = 1.6,
    schedule: str = "exponential",
    *,
    span: float = 2.0,
    pmi_normalization: str = "token",
    length_normalization: bool = True,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    fidelity: str = "paper",
    signal: str = "pmi",
    target: str = "gamma",
) -> tuple[Tensor, Tensor]:
    """Per-pair losses, whose mean is the loss of a batch, and the margins gamma.

    `prior_*_logps` are log pi(y), the responses scored without their prompts; None where no margin reads them
    (`schedule="constant"`, `signal="loglik"`). The margin carries no gradient (App. B). `label_smoothing` is the share
    of pairs whose labels are taken to be flipped, `sft_weight` the weight of the chosen responses' negative
    log-likelihood, a mean over the tokens of the batch; both as in SimPO's code. The last three are `RMiPO`'s ablations.

    Raises ValueError for a hyperparameter outside its domain, and for priors that are None where a margin reads them.
    """
    # A misspelt reading would be another loss in silence. The fields of `RMiPO` say what there is.
    objective = RMiPO(
        beta=beta, gamma_min=gamma_min, gamma_max=gamma_max, schedule=schedule, span=span,
        pmi_normalization=pmi_normalization, length_normalization=length_normalization, label_smoothing=label_smoothing,
        sft_weight=sft_weight, fidelity=fidelity, signal=signal, target=target,
    )  # fmt: skip
    if prior_chosen_logps is None and objective.needs:
        raise ValueError(
            f"prior_chosen_logps is None: the margin of schedule {schedule!r} and signal {signal!r} reads it"
        )
    scores = PairScores(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = scores.logps(per_token=True)
    if prior_chosen_logps is None or signal == "loglik":
        modulator = chosen - rejected  # Eq. 6; the constant schedule reads its shape alone
    else:
        chosen_pmi = response_pmi(chosen_logps, prior_chosen_logps, chosen_lengths, pmi_normalization, fidelity)
        rejected_pmi = response_pmi(rejected_logps, prior_rejected_logps, rejected_lengths, pmi_normalization, fidelity)
        modulator = delta_pmi(chosen_pmi, rejected_pmi)
    # Without detach the model could lower the loss by lowering its own margins.
    gamma = scheduled_margin(modulator.detach(), gamma_min, gamma_max, schedule, span)
    if signal == "shuffled":
        gamma = gamma.roll(1)  # pairs come in random order, so this is a shuffle in which no pair keeps its own margin
    chosen, rejected = scores.logps(length_normalization)  # the margin keeps its reading of PMI
    reward_difference = beta * chosen - beta * rejected
    if target == "beta":  # Table 3 without GM: the same modulation, relative to the middle of the bounds
        middle = torch.full_like(gamma, (gamma_min + gamma_max) / 2)
        reward_difference, gamma = reward_difference * gamma / middle, middle
    losses = margin_loss(reward_difference, gamma * beta if fidelity == "release" else gamma, label_smoothing)  # Eq. 8
    if sft_weight:
        losses = losses + sft_weight * base.token_nll(scores)
    return losses, gamma


@hyperparameters
class RMiPO(base.Objective):
    """`rmipo_loss` with hyperparameters, diagnostics, and the switches of the paper's ablations.

    `pmi_normalization="sequence"`: Eq. 7 as printed, with sums. `fidelity="release"`: the authors' code, where beta
    multiplies the margin too, the assistant header belongs to the response, and log pi(y) has no BOS, so that a
    response's first token is not scored and its mean is over |y| - 1 tokens. Table 3: `signal="loglik"` puts A_w - A_l
    in the place of delta_pmi (Eq. 6), `target="beta"` modulates beta. `signal="shuffled"` is a control: each pair of a
    micro-batch gets the margin of another, so margins are distributed as before but say nothing about their pair.
    `length_normalization=False`: beta times the sums. `label_smoothing` and `sft_weight` are SimPO's.
    """

    name = "rmipo"

    beta: Positive = 2.0
    gamma_min: NotNegative = 0.3
    gamma_max: Positive = 1.6
    schedule: Literal["exponential", "linear", "cosine", "constant"] = "exponential"
    span: Positive = 2.0
    pmi_normalization: Literal["token", "sequence"] = "token"
    prior_context: Literal["header", "bos", "none"] = "header"  # what log pi(y) is conditioned on
    prior_model: Literal["policy", "initial"] = "policy"  # whose log pi(y); the initial policy's is scored only once
    length_normalization: Flag = True
    fidelity: Literal["paper", "release"] = "paper"
    signal: Literal["pmi", "loglik", "shuffled"] = "pmi"
    target: Literal["gamma", "beta"] = "gamma"
    label_smoothing: Smoothing = 0.0
    sft_weight: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.gamma_min > self.gamma_max:
            raise ValueError(f"gamma_min is {self.gamma_min}: expected at most gamma_max, which is {self.gamma_max}")
        if self.fidelity == "release":
            for key in ("pmi_normalization", "prior_context"):
                if getattr(self, key) in ("sequence", "bos"):
                    raise ValueError(f"{key} is {getattr(self, key)!r}: not with fidelity 'release'; remove it")
            object.__setattr__(self, "prior_context", "none")  # the class is frozen
        elif self.prior_context == "none":
            raise ValueError("prior_context is 'none': not with fidelity 'paper'; expected header or bos")
        if self.schedule in ("exponential", "constant") and self.span != type(self).span:
            raise ValueError(f"span is {self.span}: it has no effect under schedule {self.schedule!r}; remove it")

    @property
    def needs(self) -> frozenset[str]:
        prior = {"policy": "prior", "initial": "initial_prior"}[self.prior_model]
        return frozenset({prior} if self.signal != "loglik" and self.schedule != "constant" else ())

    @property
    def header_in_response(self) -> bool:
        return self.fidelity == "release"

    @property
    def regroups(self) -> str:
        return "nothing" if self.signal == "shuffled" else super().regroups

    @property
    def min_pairs(self) -> int:
        return 2 if self.signal == "shuffled" else 1  # a shuffle

    def __call__(self, scores: PairScores, state: base.State | None = None) -> base.ObjectiveOutput:
        priors = (scores.prior_chosen_logps, scores.prior_rejected_logps) if self.needs else (None, None)
        scored_by = ("prior_context", "prior_model")  # they decide what log pi(y) is, not what becomes of it
        losses, gamma = rmipo_loss(
            scores.chosen_logps,
            scores.rejected_logps,
            *priors,
            scores.chosen_lengths,
            scores.rejected_lengths,
            **{name: value for name, value in vars(self).items() if name not in scored_by},
        )
        chosen, rejected = scores.logps(self.length_normalization)
        diagnostics = self._pmi(scores) if self.needs else {}
        return base.make_output(losses, self.beta * chosen, self.beta * rejected, gamma, **diagnostics)

    def _pmi(self, scores: PairScores) -> dict[str, Tensor]:
        reading = self.pmi_normalization, self.fidelity
        chosen = response_pmi(scores.chosen_logps, scores.prior_chosen_logps, scores.chosen_lengths, *reading)
        rejected = response_pmi(scores.rejected_logps, scores.prior_rejected_logps, scores.rejected_lengths, *reading)
        return {"pmi_chosen": chosen, "pmi_rejected": rejected, "delta_pmi": delta_pmi(chosen, rejected)}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Distribution of gamma over the pairs of a step and, where PMI was scored, of delta_pmi and its two terms."""
        gamma = columns["gamma"].double()
        summary = {
            "gamma_mean": gamma.mean(),
            "gamma_std": gamma.std(unbiased=False),
            # Pairs that the model ranks wrongly by PMI; often most of them.
            "gamma_at_max": (gamma > self.gamma_max - 1e-6).double().mean(),
            "gamma_at_min": (gamma <= self.gamma_min + 0.01).double().mean(),
        }
        if "delta_pmi" in columns:
            signal = columns["delta_pmi"].double()
            length_difference = (columns["chosen_lengths"] - columns["rejected_lengths"]).double()
            summary |= {
                "delta_pmi_mean": signal.mean(),
                "delta_pmi_std": signal.std(unbiased=False),
                "pmi_chosen_mean": columns["pmi_chosen"].double().mean(),
                "pmi_rejected_mean": columns["pmi_rejected"].double().mean(),
            }
            if signal.min() < signal.max() and length_difference.min() < length_difference.max():  # else undefined
                summary["corr_delta_pmi_length"] = torch.corrcoef(torch.stack([signal, length_difference]))[0, 1]
        return {f"{self.name}/{key}": value.item() for key, value in summary.items()}
