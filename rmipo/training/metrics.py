"""The numbers that are logged, by the same names for every method, and the end of a run whose loss is not finite."""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from rmipo.errors import UserError
from rmipo.objectives import Objective, ObjectiveOutput, PairScores
from rmipo.training.batching import PackedMicroBatch
from rmipo.training.distributed import gather


@dataclass
class LogWindow:
    """The pairs of this process since the last log line, and the time since then."""

    columns: list[dict[str, torch.Tensor]] = field(default_factory=list)  # of each micro-batch, from `columns_of`
    tokens: int = 0  # packed positions with a gradient
    start: float = field(default_factory=time.perf_counter)


def columns_of(scores: PairScores, output: ObjectiveOutput) -> dict[str, torch.Tensor]:
    """Everything known per pair, detached: `{name: (pairs,)}`, named as the fields of both plus the diagnostics."""
    columns = vars(scores) | vars(output) | output.diagnostics
    del columns["diagnostics"]
    return {name: value.detach() for name, value in columns.items() if value is not None}


def step_metrics(columns: dict[str, torch.Tensor], objective: Objective) -> dict[str, float]:
    """Metrics of the pairs of a whole step (all processes), without a prefix.

    `rewards/*` are in the method's own units, margin gamma excluded. `common/*` compare methods: log-probabilities per
    token (nats) and the share of pairs in which the chosen response is ahead; a tie counts as a loss.
    """
    chosen, rejected = columns["chosen_rewards"], columns["rejected_rewards"]
    chosen_mean = columns["chosen_logps"] / columns["chosen_lengths"]
    rejected_mean = columns["rejected_logps"] / columns["rejected_lengths"]
    means = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": columns["chosen_logps"],
        "logps/rejected": columns["rejected_logps"],
        "common/chosen_avg_logp": chosen_mean,
        "common/margin_avg_logp": chosen_mean - rejected_mean,
        "common/acc_avg_logp": chosen_mean > rejected_mean,
        "common/acc_sum_logp": columns["chosen_logps"] > columns["rejected_logps"],
    }
    if "ref_chosen_logps" in columns:
        chosen_ratio = columns["chosen_logps"] - columns["ref_chosen_logps"]
        rejected_ratio = columns["rejected_logps"] - columns["ref_rejected_logps"]
        means["common/acc_logratio"] = chosen_ratio > rejected_ratio
    # float64: the mean of thousands of equal values is then that value.
    metrics = {name: value.double().mean().item() for name, value in means.items()}
    # The method's own diagnostics have its name in front, so they can't meet these.
    return metrics | objective.summarize(columns)


def evaluation_metrics(objective: Objective) -> list[str]:
    """The names of what an evaluation logs of pairs, without their prefix `eval_`: those of made-up scores."""
    draw = torch.Generator().manual_seed(0)
    unread = () if "reference" in objective.needs else ("ref_chosen_logps", "ref_rejected_logps")
    names = [field.name for field in fields(PairScores) if field.name not in unread]
    scores = PairScores(**{name: 1 + torch.rand(8, generator=draw) for name in names})
    return ["loss", *step_metrics(columns_of(scores, objective(scores)), objective)]


def check_logged(name: str, known: Collection[str]) -> None:
    """Raises ValueError unless `name`, with or without its prefix `eval_`, is one of the metrics `known`."""
    if name.removeprefix("eval_") not in known:
        raise ValueError(f"no evaluation logs it: expected one of {', '.join(f'eval_{metric}' for metric in known)}")


def peak_memory_gib(device: torch.device) -> float:
    """Largest allocation on the GPU so far; on the CPU, the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class NonFiniteLossError(UserError, RuntimeError):
    """The loss of some pair is NaN or infinite; the message names the file with the row numbers."""


def raise_if_not_finite(
    losses: list[torch.Tensor], micro_batches: list[PackedMicroBatch], output_dir: str | Path, step: int
) -> None:
    """Stop all processes together if a loss of this step is NaN or infinite: one synchronisation per optimizer step.

    Args:
        losses: `(real pairs,)` of each micro-batch of this process.

    Raises:
        NonFiniteLossError: with the rows of this process's pairs and their losses written to a file in `output_dir`.
    """
    values = torch.cat(losses).detach()
    # All or none raise: a process that goes on alone would wait for the others in its next forward.
    if gather(values.sum().reshape(1)).isfinite().all():
        return
    # Each process writes its own: the pairs are on different machines.
    path = Path(output_dir) / f"non_finite_rank{PartialState().process_index}.json"
    rows = [row for micro_batch in micro_batches for row in micro_batch.rows[: micro_batch.cut.real]]
    pairs = [{"row": row, "loss": str(loss)} for row, loss in zip(rows, values.tolist(), strict=True)]
    path.write_text(json.dumps({"step": step, "pairs": pairs}, indent=1))
    raise NonFiniteLossError(
        f"the loss of step {step} is not finite; the rows of its pairs are in {path}. Look at those rows, or lower "
        "learning_rate, and train into another output_dir"
    )
