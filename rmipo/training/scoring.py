"""Model + packed rows -> log-probabilities of response tokens, and their sums per response."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rmipo.errors import UserError
from rmipo.training import attention
from rmipo.training.logprobs import label_logps
from rmipo.training.packing import PackedRow, pack_pairs, pack_priors, pad

# Largest mean |difference| of per-token log-probabilities between a packed row and its unpacked sequences.
PARITY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class ParityError(UserError, RuntimeError):
    """The packed forward disagrees with the plain one: training would optimise something else."""


def token_logps(model: torch.nn.Module, row: PackedRow, kind: str, config) -> torch.Tensor:
    """Log-probability of every response token of a packed row, `(R,)` float32, in the order of `row["labels"]`.

    Args:
        model: the (wrapped) model, already switched by `attention.attach(model, kind)`. The LM head runs at response
            positions only; with kind flex it is TRL's fused one, which never holds all logits. The call goes through
            the wrapper, as ZeRO-3 needs to gather parameters.
    """
    if kind != "flex":
        return logits_to_logps(response_logits(model, row, kind, config), row)
    labels = pad(row, attention.BLOCK)["shift_labels"]
    scored = model(**_inputs(row, kind, config), shift_labels=labels, fused_lm_head=True)
    return scored.log_probs.squeeze(0).index_select(0, row["keep"])


def logits_to_logps(logits: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """Log-probabilities of the row's response tokens, `(R,)` float32, from `(R, vocabulary)` logits.

    Their backward overwrites the logits; see `logps.label_logps`.
    """
    return label_logps(logits, row["labels"])


def response_logits(model: torch.nn.Module, row: PackedRow, kind: str, config) -> torch.Tensor:
    """Logits at the positions that predict response tokens, `(R, vocabulary)`."""
    return model(**_inputs(row, kind, config), logits_to_keep=row["keep"]).logits.squeeze(0)


def _inputs(row: PackedRow, kind: str, config) -> dict:
    """Arguments of the model's forward that lay out `row`."""
    row = pad(row, attention.BLOCK) if kind == "flex" else row
    layout = {"input_ids": row["input_ids"], "position_ids": row["position_ids"], "use_cache": False}
    return layout | attention.forward_kwargs(kind, row, config)


def sum_by_sequence(values: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """Sum `(R,)` per-token values over each response: `(S,)` float32, accumulated in float64."""
    sums = torch.zeros(row["num_sequences"], dtype=torch.float64, device=values.device)
    return sums.index_add(0, row["owner"], values.double()).float()


def sequence_lengths(row: PackedRow) -> torch.Tensor:
    """Number of scored tokens of each response, `(S,)` float32."""
    ones = torch.ones(len(row["owner"]), device=row["owner"].device)
    return torch.zeros(row["num_sequences"], device=ones.device).index_add(0, row["owner"], ones)


def split_pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(2 pairs,)` values in packing order -> chosen, rejected: each `(pairs,)`."""
    return values.view(-1, 2).unbind(1)


def check_parity(model: torch.nn.Module, unwrapped: PreTrainedModel, row: PackedRow, kind: str) -> float:
    """Score `row` packed and sequence by sequence without packing; return the mean |difference| per token.

    Raises ParityError beyond PARITY_TOLERANCE of the model's dtype. Leaves the model attached to `kind`.
    """
    config = unwrapped.config
    with torch.no_grad():
        packed = token_logps(model, row, kind, config)
        attention.attach(unwrapped, "plain")
        plain = []
        for prefix_start, shared, start, length in row["segments"]:
            prefix = row["input_ids"][:, prefix_start : prefix_start + shared]
            ids = torch.cat([prefix, row["input_ids"][:, start : start + length]], dim=1)
            labels = row["shift_labels"][0, start : start + length]
            logits = model(input_ids=ids, use_cache=False).logits[0, shared:]
            plain.append(-F.cross_entropy(logits.float(), labels, reduction="none"))
        attention.attach(unwrapped, kind)
    difference = (packed - torch.cat(plain)).abs().mean().item()
    tolerance = PARITY_TOLERANCE[unwrapped.dtype]
    if not difference <= tolerance:
        raise ParityError(
            f"attention: {kind} scores {type(unwrapped).__name__} differently from the plain forward: mean difference "
            f"of {difference:.2e} nats per token, tolerance {tolerance:.0e}. Set `attention: dense` in the recipe."
        )
    return difference


def score_pairs(
    model: PreTrainedModel, batches: Iterable[list[dict]], prior_context: list[int] | None = None, kind: str = "auto"
) -> dict[str, torch.Tensor]:
    """Score tokenised pairs without gradients.

    Args:
        batches: lists of rows with `prompt_ids`, `chosen_ids`, `rejected_ids`; each list becomes one packed row.
        prior_context: `ChatFormat.prior_context(...)` to score log pi(y) too; None leaves it out.

    Returns:
        CPU float32 tensors `(pairs,)` named like the fields of `PairScores`: sums of log-probabilities and lengths.
    """
    kind = attention.resolve_kind(kind, model.device)
    columns: dict[str, list[torch.Tensor]] = {}
    model.eval()
    attention.attach(model, kind)
    try:
        with torch.no_grad():
            for batch in batches:
                rows = {"": pack_pairs(batch)}
                if prior_context is not None:
                    rows["prior_"] = pack_priors(batch, prior_context)
                for prefix, row in rows.items():
                    row = to_device(row, model.device)
                    sums = split_pairs(sum_by_sequence(token_logps(model, row, kind, model.config), row))
                    lengths = split_pairs(sequence_lengths(row))
                    for side, logps, length in zip(("chosen", "rejected"), sums, lengths, strict=True):
                        columns.setdefault(f"{prefix}{side}_logps", []).append(logps.cpu())
                        if not prefix:
                            columns.setdefault(f"{side}_lengths", []).append(length.cpu())
    finally:
        attention.attach(model, "plain")
    return {name: torch.cat(values) for name, values in columns.items()}


def to_device(row: PackedRow, device: torch.device) -> PackedRow:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in row.items()}


@torch.no_grad()
def perturbed_logratios(
    logits: torch.Tensor, reference_logits: torch.Tensor, row: PackedRow, epsilon: float, chunk: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """S(w) - S(l) under epsilon-DPO's two perturbed policies, `(pairs,)` each: (plus, minus).

    plus is proportional to exp((1 + eps) z - eps z_ref), minus to exp((1 - eps) z + eps z_ref), for logits z. Only
    `chunk` rows of the two `(R, vocabulary)` inputs are in float32 at a time.
    """
    parts: dict[float, list[torch.Tensor]] = {epsilon: [], -epsilon: []}
    for start in range(0, len(logits), chunk):
        policy, reference = (z[start : start + chunk].float() for z in (logits, reference_logits))
        labels = row["labels"][start : start + chunk]
        for sign, values in parts.items():
            values.append(-F.cross_entropy(policy + sign * (policy - reference), labels, reduction="none"))
    plus, minus = (split_pairs(sum_by_sequence(torch.cat(values), row)) for values in parts.values())
    return plus[0] - plus[1], minus[0] - minus[1]
