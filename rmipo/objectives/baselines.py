"""The rivals of RMiPO in the paper's Table 4: those that read the policy alone, then those with a frozen reference.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

from collections.abc import Mapping
from typing import Literal

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
    Smoothing,
    State,
    hyperparameters,
    make_output,
    margin_loss,
    one_process,
    token_nll,
)

EMA_DECAY = 0.9  # of the gap statistics of alpha-DPO and beta-DPO, in both released codes
STD_FLOOR = 1e-6  # policy == reference makes every gap 0; z-scores must then be 0, not NaN
BETA_FLOOR = 1e-3  # beta-DPO's released code
SELECTION_SEED = 20240717  # beta-DPO's draws: equal on all ranks, different at every micro-step


@hyperparameters
class SimPO(Objective):
    """-log sigmoid(beta (A_w - A_l) - gamma). `length_normalization=False` rewards with beta * S.

    `label_smoothing` and `sft_weight` are those of its authors' code; see `rmipo_loss`.
    """

    name = "simpo"

    beta: Positive = 2.0
    gamma: NotNegative = 1.0
    length_normalization: Flag = True
    label_smoothing: Smoothing = 0.0
    sft_weight: NotNegative = 0.0

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logps(self.length_normalization)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        losses = margin_loss(chosen_rewards - rejected_rewards, self.gamma, self.label_smoothing)
        if self.sft_weight:
            # An option of SimPO's own trainer; the paper's loss is without it.
            losses = losses + self.sft_weight * token_nll(scores)
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
        chosen, rejected = scores.logps(per_token=not self.constant_length)
        if self.constant_length:
            chosen, rejected = chosen / self.constant_length, rejected / self.constant_length
        # exp keeps the order of A: as a reward A itself compares with SimPO's.
        return make_output(rejected.exp() - chosen.exp(), chosen, rejected)


@hyperparameters
class SupervisedObjective(Objective):
    """What CPO and SLiC share: the term -sft_weight * log pi(w), a mean over tokens or summed over each response."""

    logged = ("nll",)

    sft_weight: NotNegative = 1.0
    sft_normalization: Literal["token", "sequence"] = "token"

    @property
    def regroups(self) -> str:
        return "micro-batches" if self.sft_normalization == "token" else "pairs"

    def nll(self, scores: PairScores) -> Tensor:
        return token_nll(scores) if self.sft_normalization == "token" else -scores.chosen_logps


@hyperparameters
class CPO(SupervisedObjective):
    """-log sigmoid(beta (S_w - S_l)) - sft_weight * log pi(w), the last term a mean over tokens as in TRL."""

    name = "cpo"

    beta: Positive = 0.01

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        # Sums, as in DPO without its reference: CPO does not normalise by length.
        chosen_rewards, rejected_rewards = self.beta * scores.chosen_logps, self.beta * scores.rejected_logps
        nll = self.nll(scores)
        losses = margin_loss(chosen_rewards - rejected_rewards) + self.sft_weight * nll
        return make_output(losses, chosen_rewards, rejected_rewards, nll=nll)


@hyperparameters
class SLiC(SupervisedObjective):
    """max(0, delta - (S_w - S_l)) - sft_weight * log pi(w): the hinge of SLiC-HF with the chosen as SFT target."""

    name = "slic"

    delta: Positive = 1.0
    length_normalization: Flag = False
    sft_normalization: Literal["token", "sequence"] = "sequence"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logps(self.length_normalization)
        nll = self.nll(scores)
        # Beyond delta a pair has no gradient but that of the SFT term.
        losses = (self.delta - (chosen - rejected)).clamp(min=0) + self.sft_weight * nll
        return make_output(losses, chosen, rejected, nll=nll)


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
        # An evaluation before any step: its own pairs give the KL.
        z_ref = self.beta * (state or self.observe({}, scores))["batch_kl"]
        chosen, rejected = scores.logratios(per_token=False)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        # Each side by itself: KTO needs no pairs, and takes both responses as single examples.
        desirable = self.desirable_weight * (1 - torch.sigmoid(chosen_rewards - z_ref))
        undesirable = self.undesirable_weight * (1 - torch.sigmoid(z_ref - rejected_rewards))
        return make_output((desirable + undesirable) / 2, chosen_rewards, rejected_rewards, z_ref=z_ref)


# The running mean and standard deviation of the log-ratio gap, over all ranks, that alpha-DPO and beta-DPO keep. Both
# released codes start the average at 0; here it is bias-corrected by 1 - EMA_DECAY^steps.
def _observe_gap(state: State, gap: Tensor) -> State:
    # One pair has no deviation: torch would give NaN, for good in a running mean.
    std = gap.std() if len(gap) > 1 else torch.zeros_like(state["gap_std"])
    return {
        **state,
        "gap_mean": EMA_DECAY * state["gap_mean"] + (1 - EMA_DECAY) * gap.mean(),
        "gap_std": EMA_DECAY * state["gap_std"] + (1 - EMA_DECAY) * std,
        "steps": state["steps"] + 1,
    }


def _gap_statistics(state: State, gap: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of `state`, or of `gap` alone as long as nothing was observed."""
    if state["steps"] == 0:
        state = _observe_gap(state, gap.detach().double().cpu())
    weight = 1 - EMA_DECAY ** state["steps"]
    return state["gap_mean"] / weight, (state["gap_std"] / weight).clamp(min=STD_FLOOR)


@hyperparameters
class GapObjective(Objective):
    """What alpha-DPO and beta-DPO share."""

    needs = frozenset({"reference"})
    min_pairs = 2  # a standard deviation

    def init_state(self) -> State:
        return {key: torch.zeros((), dtype=torch.float64) for key in ("gap_mean", "gap_std", "steps")}


@hyperparameters
class AlphaDPO(GapObjective):
    """-log sigmoid(beta (A_w - A_l - sg[gamma_beta_ratio + alpha z(M)])), z the z-score of the log-ratio gap M.

    `fidelity="release"` is the authors' code: M per token, alpha multiplied by beta. "paper" is Table 4: M is beta
    times the summed gap, and alpha stands outside beta.
    """

    name = "alpha-dpo"
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

    def observe(self, state: State, scores: PairScores, gather: Gather = one_process, rank: int = 0) -> State:
        return _observe_gap(state, gather(self._gap(scores)).double().cpu())

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        gap = self._gap(scores)
        mean, std = _gap_statistics(state or self.init_state(), gap)
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
class BetaDPO(GapObjective):
    """-log sigmoid(sg[beta_b] (r_w - r_l)) on the pairs kept by a random selection that disfavours outlying gaps.

    `fidelity="release"` is the authors' code: one beta_b = beta (1 + alpha (mean kept gap - running mean)) for the
    global micro-batch. "paper" is Table 4: a beta_i per pair from M_i = beta * gap. A share of `rho` is left out in
    training; nothing is left out in evaluation.
    """

    name = "beta-dpo"
    logged = ("gap_mean", "gap_std", "kept", "beta")

    beta: Positive = 0.1
    alpha: NotNegative = 0.6
    rho: Share = 0.2
    fidelity: Literal["release", "paper"] = "release"
    regroups = "nothing"  # the draws go by a pair's place

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
