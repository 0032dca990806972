"""RMiPO and SimPO as published code runs them: padded rows, logits of every position in float32. No code of rmipo."""

import torch
import torch.nn.functional as F

PAD = 0


def padded_logps(model, contexts: list[list[int]], responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probabilities and numbers of response tokens, `(sequences,)` each, in one padded forward."""
    sequences = [context + response for context, response in zip(contexts, responses, strict=True)]
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), PAD)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full((len(sequences), width), -100)
    for i, (context, sequence) in enumerate(zip(contexts, sequences, strict=True)):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
        labels[i, len(context) : len(sequence)] = torch.tensor(sequence[len(context) :])
    device = model.device
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float()
    logits, labels = logits[:, :-1], labels[:, 1:].to(device)
    scored = labels != -100
    per_token = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (per_token * scored).sum(1), scored.sum(1)


def _responses(pairs: list[dict]) -> list[list[int]]:
    """All chosen, then all rejected."""
    return [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]


def _conditional(model, pairs: list[dict]) -> torch.Tensor:
    """Mean log-probability per token of chosen and rejected, `(2, pairs)`, and their token counts."""
    logps, lengths = padded_logps(model, [pair["prompt_ids"] for pair in pairs] * 2, _responses(pairs))
    return (logps / lengths).view(2, -1)


def simpo_loss(model, pairs: list[dict], beta: float, gamma: float) -> torch.Tensor:
    chosen, rejected = _conditional(model, pairs)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def rmipo_loss(
    model, pairs: list[dict], prior_context: list[int], beta: float, gamma_min: float, gamma_max: float
) -> torch.Tensor:
    """Eq. 8 with per-token PMI, in the authors' two padded passes: the second scores the responses without prompts."""
    chosen, rejected = _conditional(model, pairs)
    with torch.no_grad():
        logps, lengths = padded_logps(model, [prior_context] * (2 * len(pairs)), _responses(pairs))
        prior_chosen, prior_rejected = (logps / lengths).view(2, -1)
        delta_pmi = (chosen - prior_chosen) - (rejected - prior_rejected)
        gamma = gamma_min + (gamma_max - gamma_min) * torch.exp(-delta_pmi.clamp(min=0))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()
