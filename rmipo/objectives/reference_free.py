"""Objectives that read the policy alone: SimPO, SimPER, CPO and SLiC.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

from typing import ClassVar, Literal

from rmipo.objectives.base import (
    Flag,
    NotNegative,
    Objective,
    ObjectiveOutput,
    PairScores,
    Positive,
    Smoothing,
    State,
    hyperparameters,
    make_output,
    margin_loss,
    refuse_unread,
    sft_loss,
)


@hyperparameters
class SimPO(Objective):
    """-log sigmoid(beta (A_w - A_l) - gamma). `length_normalization=False` rewards with beta * S.

    `label_smoothing` and `sft_weight` are those of its authors' code; see `rmipo_loss`.
    """

    name = "simpo"
    hints: ClassVar[dict[str, str]] = {"gamma_beta_ratio": "use gamma, which is beta * gamma_beta_ratio"}

    beta: Positive = 2.0
    gamma: NotNegative = 1.0
    length_normalization: Flag = True
    label_smoothing: Smoothing = 0.0
    sft_weight: NotNegative = 0.0

    @property
    def regroups(self) -> str:
        # The SFT term is a mean over a micro-batch's tokens, so its pairs stay together.
        return "micro-batches" if self.sft_weight > 0 else "pairs"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logps(self.length_normalization)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        losses = margin_loss(chosen_rewards - rejected_rewards, self.gamma, self.label_smoothing)
        if self.sft_weight:
            # An option of SimPO's own trainer; the paper's loss is without it.
            losses = losses + self.sft_weight * sft_loss(scores, "token")
        return make_output(losses, chosen_rewards, rejected_rewards, self.gamma)


@hyperparameters
class SimPER(Objective):
    """-exp(A_w) + exp(A_l): inverse perplexities, no hyperparameter.

    `constant_length` > 0 divides every S by that many tokens instead of by its own length: Table 5's "without length
    normalisation", where the sums themselves would underflow.
    """

    name = "simper"

    constant_length: NotNegative = 0.0

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        if self.constant_length:
            chosen, rejected = scores.chosen_logps / self.constant_length, scores.rejected_logps / self.constant_length
        else:
            chosen, rejected = scores.logps(per_token=True)
        # exp keeps the order of A: as a reward A itself compares with SimPO's.
        return make_output(rejected.exp() - chosen.exp(), chosen, rejected)


@hyperparameters
class CPO(Objective):
    """-log sigmoid(beta (S_w - S_l)) - sft_weight * log pi(w), the last term a mean over tokens as in TRL."""

    name = "cpo"
    hints: ClassVar[dict[str, str]] = dict.fromkeys(("alpha", "cpo_alpha", "lambda"), "use sft_weight")
    logged = ("nll",)

    beta: Positive = 0.01
    sft_weight: NotNegative = 1.0
    sft_normalization: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if self.sft_weight == 0:
            refuse_unread(self, ["sft_normalization"], "sft_weight 0")

    @property
    def regroups(self) -> str:
        return "micro-batches" if self.sft_normalization == "token" else "pairs"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        # Sums, as in DPO without its reference: CPO does not normalise by length.
        chosen_rewards, rejected_rewards = self.beta * scores.chosen_logps, self.beta * scores.rejected_logps
        nll = sft_loss(scores, self.sft_normalization)
        losses = margin_loss(chosen_rewards - rejected_rewards) + self.sft_weight * nll
        return make_output(losses, chosen_rewards, rejected_rewards, nll=nll)


@hyperparameters
class SLiC(Objective):
    """max(0, delta - (S_w - S_l)) - sft_weight * log pi(w): the hinge of SLiC-HF with the chosen as SFT target."""

    name = "slic"
    hints: ClassVar[dict[str, str]] = {"beta": "use delta (Table 4 prints it as beta)", "lambda": "use sft_weight"}
    logged = ("nll",)

    delta: Positive = 1.0
    sft_weight: NotNegative = 1.0
    length_normalization: Flag = False
    sft_normalization: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        if self.sft_weight == 0:
            refuse_unread(self, ["sft_normalization"], "sft_weight 0")

    @property
    def regroups(self) -> str:
        return "micro-batches" if self.sft_normalization == "token" else "pairs"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logps(self.length_normalization)
        nll = sft_loss(scores, self.sft_normalization)
        # Beyond delta a pair has no gradient but that of the SFT term.
        losses = (self.delta - (chosen - rejected)).clamp(min=0) + self.sft_weight * nll
        return make_output(losses, chosen, rejected, nll=nll)
