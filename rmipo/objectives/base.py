"""What all objectives share: the scores they are called on, what they return, the types of their hyperparameters.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, dataclass_transform

import pydantic
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

Gather = Callable[[Tensor], Tensor]
State = dict[str, Tensor]  # 0-dimensional float64 tensors on the CPU; transient keys start with "batch_"

PRIORS = frozenset({"prior", "initial_prior"})  # needs: log pi(y) of the policy, or of the initial policy


def one_process(values: Tensor) -> Tensor:
    """`gather` of a run on a single process."""
    return values


@dataclass(frozen=True)
class PairScores:
    """Scores of a micro-batch of pairs: 1-D tensors over pairs; `*_logps` are sums in nats, `*_lengths` token counts.

    `prior_*` is log pi(y) over the same tokens; under RMiPO's fidelity "release" over all but the first of them.
    `mismatched_*` are responses under another pair's prompt (KTO). `plus/minus_logratios` are S(w) - S(l) under
    epsilon-DPO's perturbed policies. What an objective does not list in `needs` may be None.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    prior_chosen_logps: Tensor | None = None
    prior_rejected_logps: Tensor | None = None
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    mismatched_chosen_logps: Tensor | None = None
    mismatched_rejected_logps: Tensor | None = None
    ref_mismatched_chosen_logps: Tensor | None = None
    ref_mismatched_rejected_logps: Tensor | None = None
    plus_logratios: Tensor | None = None
    minus_logratios: Tensor | None = None

    def logps(self, per_token: bool) -> tuple[Tensor, Tensor]:
        """(A(w), A(l)) if `per_token`, else (S(w), S(l))."""
        return self._per_token(self.chosen_logps, self.rejected_logps, per_token)

    def logratios(self, per_token: bool) -> tuple[Tensor, Tensor]:
        """(r(w), r(l)) against the reference, per token or summed."""
        chosen, rejected = self.chosen_logps - self.ref_chosen_logps, self.rejected_logps - self.ref_rejected_logps
        return self._per_token(chosen, rejected, per_token)

    def _per_token(self, chosen: Tensor, rejected: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        if not wanted:
            return chosen, rejected
        # Responses may be empty where a process has no pairs of its own.
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(min=1)


@dataclass(frozen=True)
class ObjectiveOutput:
    """Per-pair results, each (pairs,); all but `losses` are detached.

    Rewards are the method's own, margin excluded. `gamma` is the margin of margin methods, else None. The mean of
    `losses` is the loss of the micro-batch.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    gamma: Tensor | None
    diagnostics: dict[str, Tensor]


def make_output(
    losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, gamma: Any = None, **diagnostics: Any
) -> ObjectiveOutput:
    """Detach, and expand numbers to one value per pair."""

    def column(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=losses.dtype, device=losses.device).detach().expand_as(losses)

    gamma = None if gamma is None else column(gamma)
    columns = {key: column(value) for key, value in diagnostics.items()}
    return ObjectiveOutput(losses, chosen_rewards.detach(), rejected_rewards.detach(), gamma, columns)


# Types of hyperparameters. pydantic checks them; a whole number is a number, text and booleans are not.
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
OpenShare = Annotated[float, Field(gt=0, lt=1, strict=True)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass_transform(frozen_default=True)
def hyperparameters(cls: type) -> type:
    """A frozen dataclass whose fields are checked as it is made."""
    return pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))(cls)


@hyperparameters
class Objective:
    """What all objectives share; the defaults are those of a stateless objective without a second model."""

    name: ClassVar[str]
    # What is scored besides the pairs: one of PRIORS, "reference" (the pairs under the initial policy), "mismatched"
    # (KTO's pairs), "reference_logits".
    needs: ClassVar[frozenset[str]] = frozenset()
    min_pairs: ClassVar[int] = 1  # pairs that a global micro-batch must have
    header_in_response: ClassVar[bool] = False  # whether the generation header is scored as part of the response
    logged: ClassVar[tuple[str, ...]] = ()  # columns whose means are logged

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        """Losses and rewards of a micro-batch. `state=None`: those of a first micro-batch on one process."""
        raise NotImplementedError

    @property
    def regroups(self) -> str:
        """What may move between processes without changing a step's loss, so that none waits for a longer sequence.

        "pairs" of the same micro-batch over all processes; whole "micro-batches" of the step, where the loss has a mean over
        the tokens of one (`token_nll`); "nothing" where a pair's place counts.
        """
        return "micro-batches" if getattr(self, "sft_weight", 0) > 0 else "pairs"

    @property
    def micro_batch_matters(self) -> bool:
        """Whether a pair's loss depends on which pairs share its micro-batch: then those are counted by pairs."""
        return self.min_pairs > 1 or self.regroups != "pairs"

    def init_state(self) -> State:
        """The state before the first step; saved in checkpoints."""
        return {}

    def observe(self, state: State, scores: PairScores, gather: Gather = one_process, rank: int = 0) -> State:
        """Update the state with a training micro-batch, before its loss is computed.

        Args:
            gather: concatenates a tensor of all processes in rank order; every process calls it.
            rank: of this process.
        """
        return state

    def end_step(self, state: State, columns: Mapping[str, Tensor]) -> State:
        """After an optimizer step, given the gathered columns of all its pairs. Drops what `observe` left behind."""
        return {key: value for key, value in state.items() if not key.startswith("batch_")}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The method's diagnostics over the pairs of a whole optimizer step (or evaluation)."""
        return {f"{self.name}/{key}": columns[key].double().mean().item() for key in self.logged}


def margin_loss(reward_difference: Tensor, gamma: Tensor | float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(reward difference - gamma) (Eq. 8; without a margin Eq. 2).

    With `label_smoothing` s, (1 - s) times that plus s times the loss of the flipped pair, -log sigmoid(-(...)).
    """
    # logsigmoid, as the logarithm of a sigmoid is -inf for differences below -90 or so.
    losses = -logsigmoid(reward_difference - gamma)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(gamma - reward_difference)
    return losses


def token_nll(scores: PairScores) -> Tensor:
    """-log pi(w), (pairs,), scaled so that its mean over pairs is the mean over all chosen tokens of the batch."""
    return -scores.chosen_logps * len(scores.chosen_logps) / scores.chosen_lengths.sum().clamp(min=1)
