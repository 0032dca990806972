"""Objectives that compare the policy with a frozen reference: DPO, IPO and KTO.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

from typing import ClassVar

import torch

from rmipo.objectives.base import (
    Flag,
    Gather,
    Objective,
    ObjectiveOutput,
    PairScores,
    Positive,
    State,
    hyperparameters,
    make_output,
    margin_loss,
    one_process,
)


@hyperparameters
class DPO(Objective):
    """-log sigmoid(beta (r_w - r_l)) with summed log-ratios (Eq. 2)."""

    name = "dpo"
    needs = frozenset({"reference"})

    beta: Positive = 0.01
    length_normalization: Flag = False

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logratios(self.length_normalization)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        return make_output(margin_loss(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards)


@hyperparameters
class IPO(Objective):
    """((r_w - r_l) - 1 / (2 tau))^2 with log-ratios per token, as its authors meant it (TRL); printed with sums."""

    name = "ipo"
    needs = frozenset({"reference"})
    hints: ClassVar[dict[str, str]] = {"beta": "use tau (TRL calls it beta)"}

    tau: Positive = 0.5
    length_normalization: Flag = True

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logratios(self.length_normalization)
        # A pair that is too far ahead is pulled back, where DPO would push on.
        losses = (chosen - rejected - 1 / (2 * self.tau)) ** 2
        return make_output(losses, self.tau * chosen, self.tau * rejected)


@hyperparameters
class KTO(Objective):
    """Mean of w_w (1 - sigmoid(beta r_w - z)) and w_l (1 - sigmoid(z - beta r_l)), z = beta max(0, KL), detached.

    KL is the mean log-ratio of mismatched responses over all ranks. The second term has the sign of the KTO paper;
    Table 4 prints the opposite one, which would reward a likely rejected response.
    """

    name = "kto"
    needs = frozenset({"reference", "mismatched"})
    min_pairs = 2  # z is a mean over the micro-batch: of one pair it would be noise
    hints: ClassVar[dict[str, str]] = {"lambda_w": "use desirable_weight", "lambda_l": "use undesirable_weight"}
    logged = ("z_ref",)

    beta: Positive = 0.01
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    def observe(self, state: State, scores: PairScores, gather: Gather = one_process, rank: int = 0) -> State:
        chosen = scores.mismatched_chosen_logps - scores.ref_mismatched_chosen_logps
        rejected = scores.mismatched_rejected_logps - scores.ref_mismatched_rejected_logps
        # Of all processes, or the loss would depend on how many there are. Below 0 it is noise: a KL is not.
        return {"batch_kl": gather(torch.cat([chosen, rejected]).detach()).mean().clamp(min=0)}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        if not state:
            # An evaluation before any step: its own pairs give the KL.
            state = self.observe({}, scores)
        z_ref = self.beta * state["batch_kl"]
        chosen, rejected = scores.logratios(per_token=False)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        # Each side by itself: KTO needs no pairs, and takes both responses as single examples.
        desirable = self.desirable_weight * (1 - torch.sigmoid(chosen_rewards - z_ref))
        undesirable = self.undesirable_weight * (1 - torch.sigmoid(z_ref - rejected_rewards))
        return make_output((desirable + undesirable) / 2, chosen_rewards, rejected_rewards, z_ref=z_ref)
