"""What all objectives share: the scores they are called on, what they return, their hyperparameters' domains.

Notation: S is a summed log-prob, A = S / |y| its mean per token, r = S - S_ref a log-ratio, w/l chosen/rejected.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

State = dict[str, Tensor]  # 0-dimensional float64 tensors on the CPU; transient keys start with "batch_"


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
        return self._normalized(self.chosen_logps, self.rejected_logps, per_token)

    def logratios(self, per_token: bool) -> tuple[Tensor, Tensor]:
        """(r(w), r(l)) against the reference, per token or summed."""
        chosen = self.chosen_logps - self.ref_chosen_logps
        return self._normalized(chosen, self.rejected_logps - self.ref_rejected_logps, per_token)

    def _normalized(self, chosen: Tensor, rejected: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
        if not per_token:
            return chosen, rejected
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
    losses: Tensor, rewards: tuple[Tensor, Tensor], gamma: Any = None, **diagnostics: Any
) -> ObjectiveOutput:
    """Detach, and spread numbers over the pairs."""

    def column(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=losses.dtype, device=losses.device).detach().expand_as(losses)

    chosen, rejected = rewards
    gamma = None if gamma is None else column(gamma)
    columns = {key: column(value) for key, value in diagnostics.items()}
    return ObjectiveOutput(losses, chosen.detach(), rejected.detach(), gamma, columns)


def number(default: float, low: float = 0.0, high: float = math.inf, *, open_low: bool = True) -> Any:
    """A float hyperparameter in (low, high), or [low, high) with `open_low=False`."""
    domain = f"a number {'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (low < value or (not open_low and value == low)) and value < high

    return field(default=default, metadata={"domain": domain, "accepts": accepts, "convert": float})


def flag(default: bool) -> Any:
    return field(
        default=default, metadata={"domain": "true or false", "accepts": lambda value: isinstance(value, bool)}
    )


def choice(*values: str) -> Any:
    """One of `values`; the first is the default."""
    return field(default=values[0], metadata={"domain": " | ".join(values), "accepts": lambda value: value in values})


@dataclass(frozen=True)
class Objective:
    """What all objectives share; the defaults are those of a stateless objective without a second model."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()  # of "prior", "reference", "mismatched", "reference_logits"
    min_pairs: ClassVar[int] = 1  # pairs that a global micro-batch must have
    header_in_response: ClassVar[bool] = False  # whether the generation header is scored as part of the response
    hints: ClassVar[dict[str, str]] = {}  # keys that other code bases use -> what to write here
    logged: ClassVar[tuple[str, ...]] = ()  # columns whose means are logged

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if problems := self.problems(values):
            raise ValueError(explain(type(self), problems))
        for f in fields(self):
            if convert := f.metadata.get("convert"):
                object.__setattr__(self, f.name, convert(values[f.name]))

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        """One line for each of the hyperparameters `values` with a wrong type or outside its domain."""
        triples = [(f.name, values[f.name], f.metadata) for f in fields(cls)]
        return [
            f"objective.{name} is {value!r} ({type(value).__name__}): expected {rule['domain']}"
            for name, value, rule in triples
            if not rule["accepts"](value)
        ]

    def __call__(self, scores: PairScores, state: State | None = None) -> ObjectiveOutput:
        """Losses and rewards of a micro-batch. `state=None`: as on the very first micro-batch, in a world of one."""
        raise NotImplementedError

    @property
    def micro_batch_matters(self) -> bool:
        """Whether a pair's loss depends on which pairs share its micro-batch: then those are counted by pairs."""
        return self.min_pairs > 1

    def init_state(self) -> State:
        """The state before the first step; saved in checkpoints."""
        return {}

    def observe(self, state: State, scores: PairScores, ranks: Any) -> State:
        """Take in a training micro-batch before its loss is computed; collective over `ranks`."""
        return state

    def end_step(self, state: State, columns: Mapping[str, Tensor]) -> State:
        """After an optimizer step, given the gathered columns of all its pairs. Drops what `observe` left behind."""
        return {key: value for key, value in state.items() if not key.startswith("batch_")}

    def summarize(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The method's diagnostics over the pairs of a whole optimizer step (or evaluation)."""
        return {f"{self.name}/{key}": columns[key].double().mean().item() for key in self.logged}


class Alone:
    """A world of one rank."""

    rank, world_size = 0, 1

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


def sigmoid_loss(logits: Tensor) -> Tensor:
    return -logsigmoid(logits)


def sft_loss(scores: PairScores, normalization: str) -> Tensor:
    """-log pi(w), (pairs,): summed over each response, or such that the mean over pairs is the mean over all tokens."""
    if normalization == "sequence":
        return -scores.chosen_logps
    return -scores.chosen_logps * len(scores.chosen_logps) / scores.chosen_lengths.sum().clamp(min=1)


def scaled(beta: float | Tensor, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return beta * values[0], beta * values[1]


def difference(values: tuple[Tensor, Tensor]) -> Tensor:
    return values[0] - values[1]


def explain(cls: type[Objective], problems: list[str]) -> str:
    domains = ", ".join(f"{f.name} ({f.metadata['domain']})" for f in fields(cls))
    return "\n  ".join([f"The recipe's objective block does not fit {cls.name}:", *problems, f"Its keys: {domains}"])
