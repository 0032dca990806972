"""The slow way: every response in its own padded row with its prompt, full logits in float32. Shares no code with rmipo."""

import torch


def padded_token_logps(model, sequences: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Log-probability of each response token of `(context, response)` pairs, one `(len(response),)` tensor each."""
    width = max(len(context) + len(response) for context, response in sequences)
    input_ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)
    for i, (context, response) in enumerate(sequences):
        tokens = torch.tensor([*context, *response])
        input_ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    logps = model(input_ids=input_ids, attention_mask=mask).logits.float().log_softmax(dim=-1)
    result = []
    for i, (context, response) in enumerate(sequences):
        places = range(len(context) - 1, len(context) + len(response) - 1)
        result.append(torch.stack([logps[i, t, token] for t, token in zip(places, response, strict=True)]))
    return result


def padded_pairs(model, pairs: list[dict], prior_context: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Sums of log-probabilities and lengths per pair, in float64, named like the fields of PairScores."""
    columns: dict[str, list] = {}
    for side in ("chosen", "rejected"):
        responses = [pair[f"{side}_ids"] for pair in pairs]
        scored = padded_token_logps(model, [(p["prompt_ids"], y) for p, y in zip(pairs, responses, strict=True)])
        columns[f"{side}_logps"] = [logps.double().sum() for logps in scored]
        columns[f"{side}_lengths"] = [torch.tensor(float(len(y))) for y in responses]
        if prior_context is not None:
            with torch.no_grad():
                scored = padded_token_logps(model, [(prior_context, y) for y in responses])
            columns[f"prior_{side}_logps"] = [logps.double().sum() for logps in scored]
    return {name: torch.stack(values) for name, values in columns.items()}


def rmipo_loss(scores: dict[str, torch.Tensor], beta=2.0, gamma_min=0.3, gamma_max=1.6) -> torch.Tensor:
    """Mean RMiPO loss (Eq. 8), per-token PMI, written out pair by pair."""
    losses = []
    for i in range(len(scores["chosen_logps"])):
        reward, pmi = {}, {}
        for side in ("chosen", "rejected"):
            n = scores[f"{side}_lengths"][i].double()
            conditional = scores[f"{side}_logps"][i] / n
            reward[side] = beta * conditional
            pmi[side] = conditional.detach() - scores[f"prior_{side}_logps"][i] / n
        delta = pmi["chosen"] - pmi["rejected"]
        gamma = gamma_min + (gamma_max - gamma_min) * torch.exp(-torch.clamp(delta, min=0))
        losses.append(-torch.nn.functional.logsigmoid(reward["chosen"] - reward["rejected"] - gamma))
    return torch.stack(losses).mean()


def train(model, pairs: list[dict], steps: list[list[int]], prior_context: list[int]) -> list[float]:
    """AdamW on that loss, one optimizer step per list of row numbers; returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses = []
    for rows in steps:
        loss = rmipo_loss(padded_pairs(model, [pairs[i] for i in rows], prior_context))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
