"""Every objective of the paper's Table 4: a frozen dataclass of its hyperparameters, called on the scores of pairs.

A new objective is one subclass of `Objective` here, listed in `OBJECTIVES`. Where print and published code of a
method disagree, docs/METHODS.md says how, and `fidelity` chooses between them where both are worth running.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .margin import SCHEDULES, delta_pmi, pmi, scheduled_margin
from .objective_base import (
    Alone,
    Objective,
    ObjectiveOutput,
    PairScores,
    State,
    choice,
    difference,
    explain,
    flag,
    make_output,
    number,
    scaled,
    sft_loss,
    sigmoid_loss,
)

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput", "PairScores", "build_objective"]

EMA_DECAY = 0.9  # of the gap statistics of alpha-DPO and beta-DPO, in both released codes
STD_FLOOR = 1e-6  # policy == reference makes every gap 0; z-scores must then be 0, not NaN
BETA_FLOOR = 1e-3  # beta-DPO's released code
SELECTION_SEED = 20240717  # beta-DPO's draws: equal on all ranks, different at every micro-step


@dataclass(frozen=True)
class RMiPO(Objective):
    """-log sigmoid(beta (A_w - A_l) - gamma(Delta_pmi)), Eq. 8. The margin carries no gradient (App. B).

    `fidelity="release"` is the authors' code: the margin is multiplied by beta too, log pi(y) has no BOS, so its
    first token is not scored and its mean is over |y| - 1 tokens, and the assistant header belongs to the response.
    A one-token response has no scored prior token there, and its prior mean counts as 0.

    `signal="loglik"` puts A_w - A_l in the place of Delta_pmi (Eq. 6) and `target="beta"` modulates beta instead of
    gamma: the rows of Table 3. `length_normalization=False` rewards with beta * S: beta is taken literally.
    """

    name = "rmipo"
    hints: ClassVar[dict[str, str]] = {
        "gamma": "the margin is bounded by gamma_min and gamma_max; a constant one is gamma_min = gamma_max, or simpo",
        "gamma_beta_ratio": "use gamma_min and gamma_max, which are not divided by beta",
    }

    beta: float = number(2.0)
    gamma_min: float = number(0.3, open_low=False)
    gamma_max: float = number(1.6)
    schedule: str = choice(*SCHEDULES)
    span: float = number(2.0)
    pmi_normalization: str = choice("token", "sequence")
    prior_context: str = choice("header", "bos", "none")  # what log pi(y) is conditioned on; read by data and scoring
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
        if low > high:
            problems.append(f"objective.gamma_min is {low}: expected at most gamma_max, which is {high}")
        if values["fidelity"] == "release":
            if values["prior_context"] == "bos":
                problems.append("objective.prior_context is 'bos': fidelity 'release' has none; remove the key")
            if values["pmi_normalization"] == "sequence":
                problems.append("objective.pmi_normalization is 'sequence': fidelity 'release' is per token; remove it")
        elif values["prior_context"] == "none":
            problems.append("objective.prior_context is 'none': only fidelity 'release' has that; use header or bos")
        return problems

    @property
    def needs(self) -> frozenset[str]:
        reads_pmi = self.signal == "pmi" and self.schedule != "constant"
        return frozenset({"prior"}) if reads_pmi else frozenset()

    @property
    def header_in_response(self) -> bool:
        return self.fidelity == "release"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        rewards = scaled(self.beta, scores.logps(self.length_normalization))
        reward_difference = difference(rewards)
        diagnostics = self._pmi(scores) if self.needs else {}
        signal = diagnostics["delta_pmi"] if self.needs else difference(scores.logps(per_token=True))
        modulated = scheduled_margin(signal.detach(), self.gamma_min, self.gamma_max, self.schedule, self.span)
        if self.target == "gamma":
            gamma = modulated
        else:  # Table 3 without GM: the same modulation, relative to its middle, on beta
            gamma = torch.full_like(modulated, (self.gamma_min + self.gamma_max) / 2)
            reward_difference = reward_difference * modulated / gamma
        margin = gamma * self.beta if self.fidelity == "release" else gamma
        return make_output(sigmoid_loss(reward_difference - margin), rewards, gamma, **diagnostics)  # Eq. 8

    def _pmi(self, scores: PairScores) -> dict[str, Tensor]:
        def side(logps: Tensor, prior_logps: Tensor, lengths: Tensor) -> Tensor:
            if self.pmi_normalization == "sequence":
                return pmi(logps, prior_logps)
            return pmi(logps, prior_logps, lengths, lengths - 1 if self.fidelity == "release" else None)

        chosen = side(scores.chosen_logps, scores.prior_chosen_logps, scores.chosen_lengths)
        rejected = side(scores.rejected_logps, scores.prior_rejected_logps, scores.rejected_lengths)
        return {"pmi_chosen": chosen, "pmi_rejected": rejected, "delta_pmi": delta_pmi(chosen, rejected)}  # Eq. 7

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        gamma = columns["gamma"].double()
        summary = {
            "gamma_mean": gamma.mean(),
            "gamma_std": gamma.std(unbiased=False),
            "gamma_at_max": (gamma > self.gamma_max - 1e-6).double().mean(),
            "gamma_at_min": (gamma <= self.gamma_min + 0.01).double().mean(),
        }
        if self.needs:
            signal = columns["delta_pmi"].double()
            length_difference = (columns["chosen_lengths"] - columns["rejected_lengths"]).double()
            summary |= {
                "delta_pmi_mean": signal.mean(),
                "delta_pmi_std": signal.std(unbiased=False),
                "pmi_chosen_mean": columns["pmi_chosen"].double().mean(),
                "pmi_rejected_mean": columns["pmi_rejected"].double().mean(),
            }
            if signal.std(unbiased=False) > 0 and length_difference.std(unbiased=False) > 0:  # undefined otherwise
                summary["corr_delta_pmi_length"] = torch.corrcoef(torch.stack([signal, length_difference]))[0, 1]
        return {f"{self.name}/{key}": value.item() for key, value in summary.items()}


@dataclass(frozen=True)
class DPO(Objective):
    """-log sigmoid(beta (r_w - r_l)) with summed log-ratios (Eq. 2)."""

    name = "dpo"
    needs = frozenset({"reference"})

    beta: float = number(0.01)
    length_normalization: bool = flag(False)

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        rewards = scaled(self.beta, scores.logratios(self.length_normalization))
        return make_output(sigmoid_loss(difference(rewards)), rewards)


@dataclass(frozen=True)
class SLiC(Objective):
    """max(0, delta - (S_w - S_l)) - sft_weight * log pi(w): the hinge of SLiC-HF with the chosen as SFT target."""

    name = "slic"
    hints: ClassVar[dict[str, str]] = {"beta": "use delta (Table 4 prints it as beta)", "lambda": "use sft_weight"}
    logged = ("nll",)

    delta: float = number(1.0)
    sft_weight: float = number(1.0, open_low=False)
    length_normalization: bool = flag(False)
    sft_normalization: str = choice("sequence", "token")

    @property
    def micro_batch_matters(self) -> bool:
        return self.sft_normalization == "token"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        rewards = scores.logps(self.length_normalization)
        nll = sft_loss(scores, self.sft_normalization)
        return make_output((self.delta - difference(rewards)).clamp(min=0) + self.sft_weight * nll, rewards, nll=nll)


@dataclass(frozen=True)
class IPO(Objective):
    """((r_w - r_l) - 1 / (2 tau))^2 with log-ratios per token, as its authors meant it (TRL); printed with sums."""

    name = "ipo"
    needs = frozenset({"reference"})
    hints: ClassVar[dict[str, str]] = {"beta": "use tau (TRL calls it beta)"}

    tau: float = number(0.5)
    length_normalization: bool = flag(True)

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        logratios = scores.logratios(self.length_normalization)
        return make_output((difference(logratios) - 1 / (2 * self.tau)) ** 2, scaled(self.tau, logratios))


@dataclass(frozen=True)
class CPO(Objective):
    """-log sigmoid(beta (S_w - S_l)) - sft_weight * log pi(w), the last term a mean over tokens as in TRL."""

    name = "cpo"
    hints: ClassVar[dict[str, str]] = dict.fromkeys(("alpha", "cpo_alpha", "lambda"), "use sft_weight")
    logged = ("nll",)

    beta: float = number(0.01)
    sft_weight: float = number(1.0, open_low=False)
    sft_normalization: str = choice("token", "sequence")

    @property
    def micro_batch_matters(self) -> bool:
        return self.sft_normalization == "token"

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        rewards = scaled(self.beta, scores.logps(per_token=False))
        nll = sft_loss(scores, self.sft_normalization)
        return make_output(sigmoid_loss(difference(rewards)) + self.sft_weight * nll, rewards, nll=nll)


@dataclass(frozen=True)
class KTO(Objective):
    """Mean of w_w (1 - sigmoid(beta r_w - z)) and w_l (1 - sigmoid(z - beta r_l)), z = beta max(0, KL), detached.

    KL is the mean log-ratio of mismatched responses over all ranks. The second term has the sign of the KTO paper;
    Table 4 prints the opposite one, which would reward a likely rejected response.
    """

    name = "kto"
    needs = frozenset({"reference", "mismatched"})
    min_pairs = 2  # one pair has no other prompt to be mismatched with
    hints: ClassVar[dict[str, str]] = {"lambda_w": "use desirable_weight", "lambda_l": "use undesirable_weight"}
    logged = ("z_ref",)

    beta: float = number(0.01)
    desirable_weight: float = number(1.0)
    undesirable_weight: float = number(1.0)

    def observe(self, state: State, scores: PairScores, ranks: Any) -> State:
        chosen = scores.mismatched_chosen_logps - scores.ref_mismatched_chosen_logps
        rejected = scores.mismatched_rejected_logps - scores.ref_mismatched_rejected_logps
        return {**state, "batch_kl": ranks.gather(torch.cat([chosen, rejected]).detach()).mean().clamp(min=0)}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        if not state:
            state = self.observe({}, scores, Alone())
        z_ref = self.beta * state["batch_kl"]
        chosen, rejected = rewards = scaled(self.beta, scores.logratios(per_token=False))
        desirable = self.desirable_weight * (1 - torch.sigmoid(chosen - z_ref))
        undesirable = self.undesirable_weight * (1 - torch.sigmoid(z_ref - rejected))
        return make_output((desirable + undesirable) / 2, rewards, z_ref=z_ref)


@dataclass(frozen=True)
class SimPO(Objective):
    """-log sigmoid(beta (A_w - A_l) - gamma). `length_normalization=False` rewards with beta * S."""

    name = "simpo"
    hints: ClassVar[dict[str, str]] = {"gamma_beta_ratio": "use gamma, which is beta * gamma_beta_ratio"}

    beta: float = number(2.0)
    gamma: float = number(1.0, open_low=False)
    length_normalization: bool = flag(True)

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        rewards = scaled(self.beta, scores.logps(self.length_normalization))
        return make_output(sigmoid_loss(difference(rewards) - self.gamma), rewards, self.gamma)


# The running mean and standard deviation of the log-ratio gap, over all ranks, that alpha-DPO and beta-DPO keep. Both
# released codes start the average at 0; here it is bias-corrected by 1 - EMA_DECAY^steps.
def _gap_state() -> State:
    return {key: torch.zeros((), dtype=torch.float64) for key in ("gap_mean", "gap_std", "steps")}


def _observe_gap(state: State, gap: Tensor) -> State:
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


@dataclass(frozen=True)
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

    beta: float = number(2.5)
    gamma_beta_ratio: float = number(0.6, open_low=False)
    alpha: float = number(0.2, open_low=False)
    fidelity: str = choice("release", "paper")
    length_normalization: bool = flag(True)

    def _gap(self, scores: PairScores) -> Tensor:
        if self.fidelity == "paper":
            return self.beta * difference(scores.logratios(per_token=False)).detach()
        return difference(scores.logratios(self.length_normalization)).detach()

    def init_state(self) -> State:
        return _gap_state()

    def observe(self, state: State, scores: PairScores, ranks: Any) -> State:
        return _observe_gap(state, ranks.gather(self._gap(scores)).double().cpu())

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        gap = self._gap(scores)
        mean, std = _gap_statistics(state, gap)
        adaptive = self.alpha * (gap - mean) / std
        gamma = self.beta * self.gamma_beta_ratio + (adaptive if self.fidelity == "paper" else self.beta * adaptive)
        logps = scores.logps(self.length_normalization)
        losses = sigmoid_loss(self.beta * difference(logps) - gamma)
        chosen_logratios, rejected_logratios = scores.logratios(self.length_normalization)
        rewards = scaled(
            self.beta, (logps[0] - self.alpha * chosen_logratios, logps[1] - self.alpha * rejected_logratios)
        )
        return make_output(losses, rewards, gamma, gap_mean=mean, gap_std=std, alpha_over_std=self.alpha / std)


@dataclass(frozen=True)
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

    beta: float = number(0.1)
    alpha: float = number(0.6, open_low=False)
    rho: float = number(0.2, high=1.0, open_low=False)
    fidelity: str = choice("release", "paper")

    def init_state(self) -> State:
        return _gap_state()

    def observe(self, state: State, scores: PairScores, ranks: Any) -> State:
        gap = difference(scores.logratios(per_token=False)).detach()
        gathered = ranks.gather(gap).double().cpu()
        state = _observe_gap(state, gathered)
        mean, std = _gap_statistics(state, gathered)
        # The highest Gumbel-perturbed log-weights are a draw without replacement with those weights (underflow-free).
        # Every rank makes the same draw: same values, same seed.
        generator = torch.Generator().manual_seed(SELECTION_SEED + int(state["steps"]))
        gumbel = -torch.empty_like(gathered).exponential_(generator=generator).log()
        keys = -(((gathered - mean) / std) ** 2) / 2 + gumbel
        kept = torch.zeros_like(gathered, dtype=torch.bool)
        kept[keys.topk(max(1, round(len(keys) * (1 - self.rho)))).indices] = True
        owners = ranks.gather(torch.full_like(gap, ranks.rank)).cpu()  # ranks may have different numbers of pairs
        return {**state, "batch_kept": kept[owners == ranks.rank], "batch_center": gathered[kept].mean()}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        gap = difference(logratios := scores.logratios(per_token=False))
        if state is None:
            state = self.observe(self.init_state(), scores, Alone())
        mean, std = _gap_statistics(state, gap)
        kept = state.get("batch_kept", torch.ones(len(gap))).to(gap)
        if self.fidelity == "paper":
            excess = self.beta * (gap.detach() - mean)
        else:
            excess = state.get("batch_center", gap.detach().mean()) - mean
        beta = (self.beta * (1 + self.alpha * excess)).clamp(min=BETA_FLOOR).to(gap)
        share = kept * len(kept) / kept.sum().clamp(min=1)  # so that the mean over pairs is the mean over kept pairs
        rewards = scaled(self.beta, logratios)
        diagnostics = {"gap_mean": mean, "gap_std": std, "kept": kept, "beta": beta}
        return make_output(share * sigmoid_loss(beta * gap), rewards, **diagnostics)


@dataclass(frozen=True)
class EpsilonDPO(Objective):
    """-log sigmoid(beta_i (r_w - r_l)), beta_i = beta / (1 + epsilon k), k in {-1, 0, 1}.

    k = 1 where S(w) - S(l) rises from the policy perturbed towards the reference (minus) over the policy to the one
    perturbed away from it (plus), -1 where it falls, else 0. `fidelity="paper"` has beta (1 + epsilon) for k = -1.
    The running beta is divided by 1 + epsilon * mean(k) after every optimizer step.
    """

    name = "epsilon-dpo"
    needs = frozenset({"reference", "reference_logits"})
    hints: ClassVar[dict[str, str]] = {"eps": "use epsilon"}

    beta: float = number(0.01)
    epsilon: float = number(0.01, high=1.0)
    fidelity: str = choice("release", "paper")

    def init_state(self) -> State:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        running_beta = (state or self.init_state())["beta"]
        plus, base, minus = scores.plus_logratios, scores.chosen_logps - scores.rejected_logps, scores.minus_logratios
        k = ((plus > base) & (base > minus)).to(base.dtype) - ((minus > base) & (base > plus)).to(base.dtype)
        upper = 1 + self.epsilon if self.fidelity == "paper" else 1 / (1 - self.epsilon)
        beta = running_beta * torch.where(k < 0, upper, 1 / (1 + self.epsilon * k))
        rewards = scaled(beta, scores.logratios(per_token=False))
        return make_output(sigmoid_loss(difference(rewards)), rewards, running_beta=running_beta, k=k)

    def end_step(self, state: State, columns: Mapping[str, Tensor]) -> State:
        return {"beta": state["beta"] / (1 + self.epsilon * columns["k"].double().mean().cpu())}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        shares = {"beta": columns["running_beta"], "k_plus": columns["k"] > 0, "k_minus": columns["k"] < 0}
        return {f"{self.name}/{key}": value.double().mean().item() for key, value in shares.items()}


@dataclass(frozen=True)
class SimPER(Objective):
    """-exp(A_w) + exp(A_l): inverse perplexities, no hyperparameter.

    `constant_length` > 0 divides every S by that many tokens instead of by its own length: Table 5's "without length
    normalisation", where the sums themselves would underflow.
    """

    name = "simper"

    constant_length: float = number(0.0, open_low=False)

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        if self.constant_length:
            rewards = scaled(1 / self.constant_length, scores.logps(per_token=False))
        else:
            rewards = scores.logps(per_token=True)
        return make_output(rewards[1].exp() - rewards[0].exp(), rewards)


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (RMiPO, DPO, SLiC, IPO, CPO, KTO, SimPO, AlphaDPO, BetaDPO, EpsilonDPO, SimPER)
}


def build_objective(block: Mapping[str, Any]) -> Objective:
    """The objective of a recipe's `objective:` block.

    Raises:
        ValueError: one message with every unknown key, wrong type and value outside its domain.
    """
    block = dict(block)
    name = block.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective.name is {name!r}: expected one of {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[name]
    defaults = {f.name: f.default for f in fields(cls)}
    problems = []
    for key in block.keys() - defaults.keys():
        near = difflib.get_close_matches(str(key), defaults, n=1)
        hint = cls.hints.get(key) or (f"did you mean {near[0]}?" if near else "")
        problems.append(f"objective.{key} is not a key of {name}" + (f": {hint}" if hint else ""))
    if problems := sorted(problems) + cls.problems(defaults | block):
        raise ValueError(explain(cls, problems))
    return cls(**block)
