"""Model + packed sequences -> log-probabilities of response tokens, and their sums per response."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rmipo.training import attention
from rmipo.training.logprobs import label_logps
from rmipo.training.packing import PackedSequence, pack_pairs, pack_priors, split_pairs


def token_logps(model: torch.nn.Module, packed: PackedSequence, kind: str, config) -> torch.Tensor:
    """Log-probability of every response token, `(R,)` float32, in the order of `packed.labels`.

    Args:
        model: the (wrapped) model, already switched by `attention.attach(model, kind)`. The LM head runs at response
            positions only; with kind flex it is TRL's fused one, which never holds all logits. The call goes through
            the wrapper, as ZeRO-3 needs to gather parameters.
        config: of the unwrapped model.
    """
    if kind != "flex":
        return label_logps(response_logits(model, packed, kind, config), packed.labels)
    shift_labels = packed.padded(attention.BLOCK).shift_labels
    output = model(**forward_inputs(packed, kind, config), shift_labels=shift_labels, fused_lm_head=True)
    return output.log_probs.squeeze(0).index_select(0, packed.scored)


def response_logits(model: torch.nn.Module, packed: PackedSequence, kind: str, config) -> torch.Tensor:
    """Logits at the positions that predict response tokens, `(R, vocabulary)`."""
    return model(**forward_inputs(packed, kind, config), logits_to_keep=packed.scored).logits.squeeze(0)


def response_logps(model: torch.nn.Module, packed: PackedSequence, kind: str, config) -> torch.Tensor:
    """Log-probability of every response, `(S,)` float32; arguments as in `token_logps`."""
    return packed.sum_by_response(token_logps(model, packed, kind, config))


def forward_inputs(packed: PackedSequence, kind: str, config) -> dict:
    """Arguments of the model's forward that lay out `packed`."""
    packed = packed.padded(attention.BLOCK) if kind == "flex" else packed
    layout = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    return layout | attention.forward_kwargs(kind, packed, config)


def score_pairs(
    model: PreTrainedModel, batches: Iterable[list[dict]], prior_context: list[int] | None = None, kind: str = "auto"
) -> dict[str, torch.Tensor]:
    """Score tokenised pairs without gradients.

    Args:
        batches: lists of rows with `prompt_ids`, `chosen_ids`, `rejected_ids`; each list becomes one packed sequence.
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
                pairs = pack_pairs(batch).to(model.device)
                found = {"logps": response_logps(model, pairs, kind, model.config), "lengths": pairs.response_lengths}
                if prior_context is not None:
                    prior = pack_priors(batch, prior_context).to(model.device)
                    found["prior_logps"] = response_logps(model, prior, kind, model.config)
                for name, values in found.items():
                    for side, column in zip(("chosen", "rejected"), split_pairs(values.cpu()), strict=True):
                        named = f"prior_{side}_logps" if name == "prior_logps" else f"{side}_{name}"
                        columns.setdefault(named, []).append(column)
    finally:
        attention.attach(model, "plain")
    return {name: torch.cat(values) for name, values in columns.items()}


@torch.no_grad()
def perturbed_logratios(
    logits: torch.Tensor, reference_logits: torch.Tensor, packed: PackedSequence, epsilon: float, chunk: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """S(w) - S(l) under epsilon-DPO's two perturbed policies, `(pairs,)` each: (plus, minus).

    plus is proportional to exp((1 + eps) z - eps z_ref), minus to exp((1 - eps) z + eps z_ref), for logits z. Only
    `chunk` rows of the two `(R, vocabulary)` inputs are in float32 at a time.
    """
    parts: dict[float, list[torch.Tensor]] = {epsilon: [], -epsilon: []}
    for start in range(0, len(logits), chunk):
        policy, reference = (z[start : start + chunk].float() for z in (logits, reference_logits))
        labels = packed.labels[start : start + chunk]
        for sign, values in parts.items():
            values.append(-F.cross_entropy(policy + sign * (policy - reference), labels, reduction="none"))
    plus, minus = (split_pairs(packed.sum_by_response(torch.cat(values))) for values in parts.values())
    return plus[0] - plus[1], minus[0] - minus[1]
