"""Objectives that adapt beta or the margin to a running state: alpha-DPO, beta-DPO and epsilon-DPO.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rmipo.objectives.base import (
    Flag,
    Gather,
    NotNegative,
    Objective,
    ObjectiveOutput,
    OpenShare,
    PairScores,
    Positive,
    Share,
    State,
    hyperparameters,
    make_output,
    margin_loss,
    one_process,
)

EMA_DECAY = 0.9  # of the gap statistics of alpha-DPO and beta-DPO, in both released codes
STD_FLOOR = 1e-6  # policy == reference makes every gap 0; z-scores must then be 0, not NaN
BETA_FLOOR = 1e-3  # beta-DPO's released code
SELECTION_SEED = 20240717  # beta-DPO's draws: equal on all ranks, different at every micro-step


# The running mean and standard deviation of the log-ratio gap, over all ranks, that alpha-DPO and beta-DPO keep. Both
# released codes start the average at 0; here it is bias-corrected by 1 - EMA_DECAY^steps.
def _gap_state() -> State:
    return {key: torch.zeros((), dtype=torch.float64) for key in ("gap_mean", "gap_std", "steps")}


def _observe_gap(state: State, gap: Tensor) -> State:
    # One pair has no deviation: torch would give NaN, for good in a running mean.
    std = gap.std() if len(gap) > 1 else torch.zeros_like(state["gap_std"])
    return {
        **state,
        "gap_mean": EMA_DECAY * state["gap_mean"] + (1 - EMA_DECAY) * gap.mean(),
        "gap_std": EMA_DECAY * state["gap_std"] + (1 - EMA_DECAY) * std,
        "steps": state["steps"] + 1,
    }


def _gap_statistics(state: State | None, gap: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of `state`, or of `gap` alone as long as nothing was observed."""
    if not state or state["steps"] == 0:
        state = _observe_gap(_gap_state(), gap.detach().double().cpu())
    weight = 1 - EMA_DECAY ** state["steps"]
    return state["gap_mean"] / weight, (state["gap_std"] / weight).clamp(min=STD_FLOOR)


@hyperparameters
class AlphaDPO(Objective):
    """-log sigmoid(beta (A_w - A_l - sg[gamma_beta_ratio + alpha z(M)])), z the z-score of the log-ratio gap M.

    `fidelity="release"` is the authors' code: M per token, alpha multiplied by beta. "paper" is Table 4: M is beta
    times the summed gap, and alpha stands outside beta.
    """

    name = "alpha-dpo"
    needs = frozenset({"reference"})
    min_pairs = 2  # a standard deviation
    hints: ClassVar[dict[str, str]] = {"gamma": "use gamma_beta_ratio, which is gamma / beta"}
    logged = ("gap_mean", "gap_std", "alpha_over_std")

    beta: Positive = 2.5
    gamma_beta_ratio: NotNegative = 0.6
    alpha: NotNegative = 0.2
    fidelity: Literal["release", "paper"] = "release"
    length_normalization: Flag = True

    def _gap(self, scores: PairScores) -> Tensor:
        if self.fidelity == "paper":
            return self.beta * torch.sub(*scores.logratios(per_token=False)).detach()
        return torch.sub(*scores.logratios(self.length_normalization)).detach()

    def init_state(self) -> State:
        return _gap_state()

    def observe(self, state: State, scores: PairScores, gather: Gather = one_process, rank: int = 0) -> State:
        return _observe_gap(state, gather(self._gap(scores)).double().cpu())

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        gap = self._gap(scores)
        mean, std = _gap_statistics(state, gap)
        adaptive = self.alpha * (gap - mean) / std
        gamma = self.beta * self.gamma_beta_ratio + (adaptive if self.fidelity == "paper" else self.beta * adaptive)
        chosen, rejected = scores.logps(self.length_normalization)
        chosen_logratios, rejected_logratios = scores.logratios(self.length_normalization)
        return make_output(
            margin_loss(self.beta * (chosen - rejected), gamma),
            self.beta * (chosen - self.alpha * chosen_logratios),
            self.beta * (rejected - self.alpha * rejected_logratios),
            gamma,
            gap_mean=mean,
            gap_std=std,
            alpha_over_std=self.alpha / std,
        )


@hyperparameters
class BetaDPO(Objective):
    """-log sigmoid(sg[beta_b] (r_w - r_l)) on the pairs kept by a random selection that disfavours outlying gaps.

    `fidelity="release"` is the authors' code: one beta_b = beta (1 + alpha (mean kept gap - running mean)) for the
    global micro-batch. "paper" is Table 4: a beta_i per pair from M_i = beta * gap. A share of `rho` is left out in
    training; nothing is left out in evaluation.
    """

    name = "beta-dpo"
    needs = frozenset({"reference"})
    min_pairs = 2  # a standard deviation
    hints: ClassVar[dict[str, str]] = {"a": "use alpha", "mode_weight": "use rho"}
    logged = ("gap_mean", "gap_std", "kept", "beta")

    beta: Positive = 0.1
    alpha: NotNegative = 0.6
    rho: Share = 0.2
    fidelity: Literal["release", "paper"] = "release"
    regroups = "nothing"  # the draws go by a pair's place

    def init_state(self) -> State:
        return _gap_state()

    def observe(self, state: State, scores: PairScores, gather: Gather = one_process, rank: int = 0) -> State:
        gap = torch.sub(*scores.logratios(per_token=False)).detach()
        gathered = gather(gap).double().cpu()
        state = _observe_gap(state, gathered)
        mean, std = _gap_statistics(state, gathered)
        # The highest Gumbel-perturbed log-weights are a draw without replacement with those weights (underflow-free).
        # Every rank makes the same draw: same values, same seed.
        generator = torch.Generator().manual_seed(SELECTION_SEED + int(state["steps"]))
        gumbel = -torch.empty_like(gathered).exponential_(generator=generator).log()
        keys = -(((gathered - mean) / std) ** 2) / 2 + gumbel
        kept = torch.zeros_like(gathered, dtype=torch.bool)
        kept[keys.topk(max(1, round(len(keys) * (1 - self.rho)))).indices] = True
        owners = gather(torch.full_like(gap, rank)).cpu()  # ranks may have different numbers of pairs
        return {**state, "batch_kept": kept[owners == rank], "batch_center": gathered[kept].mean()}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logratios(per_token=False)
        gap = chosen - rejected
        if state is None:
            state = self.observe(self.init_state(), scores)
        mean, std = _gap_statistics(state, gap)
        kept = state.get("batch_kept", torch.ones(len(gap))).to(gap)
        if self.fidelity == "paper":
            excess = self.beta * (gap.detach() - mean)
        else:
            excess = state.get("batch_center", gap.detach().mean()) - mean
        beta = (self.beta * (1 + self.alpha * excess)).clamp(min=BETA_FLOOR)
        share = kept * len(kept) / kept.sum().clamp(min=1)  # so that the mean over pairs is the mean over kept pairs
        losses = share * margin_loss(beta * gap)
        diagnostics = {"gap_mean": mean, "gap_std": std, "kept": kept, "beta": beta}
        return make_output(losses, self.beta * chosen, self.beta * rejected, **diagnostics)


@hyperparameters
class EpsilonDPO(Objective):
    """-log sigmoid(beta_i (r_w - r_l)), beta_i = beta / (1 + epsilon k), k in {-1, 0, 1}.

    k = 1 where S(w) - S(l) rises from the policy perturbed towards the reference (minus) over the policy to the one
    perturbed away from it (plus), -1 where it falls, else 0. `fidelity="paper"` has beta (1 + epsilon) for k = -1.
    The running beta is divided by 1 + epsilon * mean(k) after every optimizer step.
    """

    name = "epsilon-dpo"
    needs = frozenset({"reference", "reference_logits"})
    hints: ClassVar[dict[str, str]] = {"eps": "use epsilon"}

    beta: Positive = 0.01
    epsilon: OpenShare = 0.01
    fidelity: Literal["release", "paper"] = "release"

    def init_state(self) -> State:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        running_beta = (state or self.init_state())["beta"]
        plus, base, minus = scores.plus_logratios, scores.chosen_logps - scores.rejected_logps, scores.minus_logratios
        k = ((plus > base) & (base > minus)).to(base.dtype) - ((minus > base) & (base > plus)).to(base.dtype)
        upper = 1 + self.epsilon if self.fidelity == "paper" else 1 / (1 - self.epsilon)
        beta = running_beta * torch.where(k < 0, upper, 1 / (1 + self.epsilon * k))
        chosen, rejected = scores.logratios(per_token=False)
        chosen_rewards, rejected_rewards = beta * chosen, beta * rejected
        losses = margin_loss(chosen_rewards - rejected_rewards)
        return make_output(losses, chosen_rewards, rejected_rewards, running_beta=running_beta, k=k)

    def end_step(self, state: State, columns: Mapping[str, Tensor]) -> State:
        # After the step, so that all micro-batches of it share one beta.
        return {"beta": state["beta"] / (1 + self.epsilon * columns["k"].double().mean().cpu())}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        shares = {"beta": columns["running_beta"], "k_plus": columns["k"] > 0, "k_minus": columns["k"] < 0}
        return {f"{self.name}/{key}": value.double().mean().item() for key, value in shares.items()}
