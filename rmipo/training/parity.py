"""The check at start-up: packed pairs are scored as a plain forward scores them, up to the run's own rounding.

The yardstick is the run's own: how far two plain kernels of transformers (sdpa and eager) are apart on the same pairs,
in whatever precision the model computes. A wrong mask moves log-probabilities far beyond that.
"""

import itertools
from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from rmipo.errors import UserError
from rmipo.training import attention, scoring
from rmipo.training.packing import pack_pairs

MAX_PAIRS = 4
FLOOR = 1e-4  # nats per token: the limit of runs in float32
NOISE = 3  # how many times further apart than two plain kernels log-probabilities may be


class ParityError(UserError, RuntimeError):
    """The packed forward disagrees with the plain one: training would optimise something else."""


@torch.no_grad()
def check_parity(model: torch.nn.Module, unwrapped: PreTrainedModel, rows: Iterable[dict], kind: str) -> float:
    """Score the first pairs of `rows` packed and plainly; return the mean |difference| in nats per token.

    Args:
        model: as the training step calls it; in evaluation mode.
        unwrapped: the same model without wrappers. It is left attached to `kind`.
        rows: tokenised pairs.

    Raises:
        ParityError: beyond what rounding explains, or not finite.
    """
    rows = list(itertools.islice(rows, MAX_PAIRS))
    unwrapped.set_attn_implementation("eager")
    other = plain_logps(model, unwrapped, rows)
    unwrapped.set_attn_implementation("sdpa")
    plain = plain_logps(model, unwrapped, rows)
    attention.attach(unwrapped, kind)  # last: the model is left as it trains
    pairs = send_to_device(pack_pairs(rows), unwrapped.device)
    packed = scoring.token_logps(model, pairs, unwrapped.config)

    difference = (packed - plain).abs().mean().item()
    limit = max(FLOOR, NOISE * (other - plain).abs().mean().item())
    if not difference <= limit:
        raise ParityError(
            f"attention: {kind} scores {type(unwrapped).__name__} differently from a plain forward, by {difference:.1e} nats "
            f"per token: expected at most {limit:.1e}. Set `attention: dense`, or check the weights if they are not finite"
        )
    return difference


def plain_logps(model: torch.nn.Module, unwrapped: PreTrainedModel, rows: list[dict]) -> torch.Tensor:
    """Log-probability of every response token, in the order of packed pairs, from one ordinary sequence at a time."""
    logps = []
    for row in rows:
        for response in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor(row["prompt_ids"] + response, device=unwrapped.device)
            start = len(row["prompt_ids"])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
            logps.append(scoring.label_logps(logits, ids[start:]))
    return torch.cat(logps)
