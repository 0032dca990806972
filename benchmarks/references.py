"""RMiPO and SimPO as published code runs them: padded rows, logits of every position in float32. No code of rmipo."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

PAD = 0


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)


def padded_logps(model, contexts: list[list[int]], responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probabilities and numbers of response tokens, `(sequences,)` each, in one padded forward."""
    both = list(zip(contexts, responses, strict=True))
    input_ids = padded([context + response for context, response in both], PAD).to(model.device)
    mask = padded([[1] * len(context + response) for context, response in both], 0).to(model.device)
    labels = padded([[-100] * len(context) + response for context, response in both], -100).to(model.device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100
    per_token = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (per_token * scored).sum(1), scored.sum(1)


def _average(model, contexts: list[list[int]], pairs: list[dict]) -> torch.Tensor:
    """Mean log-probability per token of chosen and rejected, `(2, pairs)`, after a context for each pair."""
    responses = [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]
    logps, lengths = padded_logps(model, contexts * 2, responses)
    return (logps / lengths).view(2, -1)


def simpo_loss(model, pairs: list[dict], beta: float, gamma: float) -> torch.Tensor:
    chosen, rejected = _average(model, [pair["prompt_ids"] for pair in pairs], pairs)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def rmipo_loss(
    model, pairs: list[dict], prior_context: list[int], beta: float, gamma_min: float, gamma_max: float
) -> torch.Tensor:
    """Eq. 8 with per-token PMI, in the authors' two padded passes: the second scores the responses without prompts."""
    chosen, rejected = _average(model, [pair["prompt_ids"] for pair in pairs], pairs)
    with torch.no_grad():
        prior_chosen, prior_rejected = _average(model, [prior_context] * len(pairs), pairs)
        delta_pmi = (chosen - prior_chosen) - (rejected - prior_rejected)
        gamma = gamma_min + (gamma_max - gamma_min) * torch.exp(-delta_pmi.clamp(min=0))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()
