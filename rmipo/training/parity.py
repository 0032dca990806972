"""The check at start-up: packed pairs are scored as a plain forward scores them, up to the run's own rounding.

The yardstick is the run's own: how far two plain kernels of transformers (sdpa and eager) are apart on the same pairs,
in whatever precision the model computes. Log-probabilities show a wrong mask, which moves them far beyond that. A
position or a window that is off by one moves them no further than bfloat16 does after thirty layers, but it shows in
the hidden states behind the first layer, where rounding has hardly begun.
"""

from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rmipo.errors import UserError
from rmipo.training import attention, scoring
from rmipo.training.packing import pack_pairs
from rmipo.training.scoring import label_logps

MAX_PAIRS = 8
MAX_POSITIONS = 4096  # of the padded batch: bounds memory and time
FLOOR = 1e-4  # nats per token, and share of a hidden state: the limit of runs in float32
NOISE = 3  # how many times further apart than two plain kernels log-probabilities may be


class ParityError(UserError, RuntimeError):
    """The packed forward disagrees with the plain one: training would optimise something else."""


class Scores(NamedTuple):
    logps: Tensor  # (R,) of the response tokens
    hidden: Tensor  # (R, ...) behind the first layer of each kind, where those tokens are predicted


def check_parity(model: torch.nn.Module, unwrapped: PreTrainedModel, rows: list[dict], kind: str) -> float:
    """Score the first pairs of `rows` packed and plainly; return the mean |difference| in nats per token.

    Args:
        model: as the training step calls it; in evaluation mode.
        unwrapped: the same model without wrappers. It is left attached to `kind`.
        rows: tokenised pairs, as many of them as fit in MAX_PAIRS and MAX_POSITIONS are scored.

    Raises:
        ParityError: beyond what rounding explains, or not finite.
    """
    rows = first_rows(rows)
    with torch.no_grad():
        plain, other = (_plain(model, unwrapped, rows, implementation) for implementation in ("sdpa", "eager"))
        attention.attach(unwrapped, kind)  # last: the model is left as it trains
        packed = _packed(model, unwrapped, rows, kind)

    noise = (other.logps - plain.logps).abs().mean().item()
    difference = packed.logps - plain.logps
    # Rounding has no sign: over many tokens it averages out, and what a wrong layout adds does not.
    signed_limit = noise * (NOISE * len(difference) ** -0.5 + 0.25)
    size = plain.hidden.abs().mean()
    found = {
        "mean difference in nats per token": (difference.abs().mean().item(), NOISE * noise),
        "mean signed difference in nats per token": (abs(difference.mean().item()), signed_limit),
        "relative difference of hidden states behind the first layer": (
            ((packed.hidden - plain.hidden).abs().mean() / size).item(),
            ((other.hidden - plain.hidden).abs().mean() / size).item(),
        ),
    }
    wrong = [f"{name} {value:.1e}, expected at most {max(FLOOR, limit):.1e}"
             for name, (value, limit) in found.items() if not value <= max(FLOOR, limit)]  # fmt: skip
    if wrong:
        way_out = (
            "This model can't be trained with packed pairs here; try another version of transformers"
            if kind == "dense"
            else "Set `attention: dense` in the recipe"
        )
        raise ParityError(
            f"attention: {kind} scores {type(unwrapped).__name__} differently from a plain forward: {'; '.join(wrong)}. "
            + (way_out if plain.logps.isfinite().all() else "The plain scores are not finite either: check the weights")
        )
    return difference.abs().mean().item()


def first_rows(rows: list[dict]) -> list[dict]:
    """As many as the limits allow, at least one."""
    widths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    count = 1
    while count < min(len(rows), MAX_PAIRS) and 2 * (count + 1) * max(widths[: count + 1]) <= MAX_POSITIONS:
        count += 1
    return rows[:count]


def _packed(model: torch.nn.Module, unwrapped: PreTrainedModel, rows: list[dict], kind: str) -> Scores:
    pairs = send_to_device(pack_pairs(rows), unwrapped.device)
    inputs = scoring.forward_inputs(pairs, kind, unwrapped.config)
    output = model(**inputs, logits_to_keep=pairs.scored, output_hidden_states=True)
    hidden = _behind_first_layers(output, unwrapped.config)[0, pairs.scored]
    return Scores(scoring.token_logps(model, pairs, kind, unwrapped.config), hidden)


def _plain(model: torch.nn.Module, unwrapped: PreTrainedModel, rows: list[dict], implementation: str) -> Scores:
    """The responses as an ordinary batch, padded on the right."""
    unwrapped.set_attn_implementation(implementation)
    sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
    ids = [torch.tensor(prompt + response) for prompt, response in sequences]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }
    batch = send_to_device(batch, unwrapped.device)
    output = model(**batch, use_cache=False, output_hidden_states=True)
    hidden = _behind_first_layers(output, unwrapped.config)
    logps, states = [], []
    for number, (prompt, response) in enumerate(sequences):
        scored = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        labels = batch["input_ids"][number, len(prompt) : len(prompt) + len(response)]
        logps.append(label_logps(output.logits[number, scored], labels))
        states.append(hidden[number, scored])
    return Scores(torch.cat(logps), torch.cat(states))


def _behind_first_layers(output, config: PreTrainedConfig) -> Tensor:
    """Hidden states `(batch, positions, kinds of layer x hidden size)` float32."""
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    first = [layer_types.index(kind) + 1 for kind in dict.fromkeys(layer_types)]
    return torch.cat([output.hidden_states[layer] for layer in first], dim=-1).float()
