"""Model + packed sequences -> log-probabilities of response tokens, and their sums per response; and the check at start-up.

Its yardstick is the run's own rounding: how far two plain kernels of transformers (sdpa and eager) are apart on the same
pairs. A wrong mask moves log-probabilities far beyond that.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig, PreTrainedModel

from rmipo.errors import UserError
from rmipo.training import attention
from rmipo.training.packing import PackedSequence, pack_pairs, pack_priors, split_pairs

TOKENS = 4096  # of a forward without gradient, about: enough to occupy a GPU, few enough for their logits to fit
# Logits that are in float32 at a time: few enough for a CPU's cache, enough to occupy a GPU.
CHUNK = {"cpu": 2**16, "cuda": 2**26}


class _LabelLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # The maximum apart from the rest of the normalizer: added up, large logits would round the rest away.
        maxima = logits.amax(-1, keepdim=True).float()
        rows = _rows(logits)
        parts = zip(logits.split(rows), maxima.split(rows), strict=True)
        log_sums = torch.cat([(part.float() - top).exp_().sum(-1, keepdim=True).log_() for part, top in parts])
        ctx.save_for_backward(logits, labels[:, None], maxima, log_sums)
        return (logits.gather(1, labels[:, None]).float() - maxima - log_sums)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # d logp / d logits = onehot(label) - softmax. Nothing needs the logits any more, so it takes their place.
        logits, *columns = ctx.saved_tensors
        rows = _rows(logits)
        columns = [values.split(rows) for values in (logits, *columns, grad[:, None])]
        for part, label, top, log_sum, scale in zip(*columns, strict=True):
            gradient = (part.float() - top).sub_(log_sum).exp_().mul_(-scale)
            part.copy_(gradient.scatter_add_(1, label, scale))
        return logits, None


def _rows(logits: torch.Tensor) -> int:
    return max(1, CHUNK[logits.device.type] // logits.shape[1])


def label_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of `labels` `(R,)` under `logits` `(R, vocabulary)`: `(R,)` float32.

    Backward overwrites `logits` with their gradient: it can run once, and nothing else may need their values after it.
    """
    return _LabelLogps.apply(logits, labels)


def token_logps(model: torch.nn.Module, packed: PackedSequence, config: PreTrainedConfig) -> torch.Tensor:
    """Log-probability of every response token, `(R,)` float32, in the order of `packed.labels`.

    Args:
        model: the (wrapped) model, already switched by `attention.attach`. The LM head runs at response positions only;
            with kind flex it is TRL's fused one, which never holds all logits.
        config: of the unwrapped model.
    """
    # The fused head goes from hidden states to log-probabilities; only kinds without it make logits.
    if attention.kind_of(config) != "flex":
        return label_logps(response_logits(model, packed, config), packed.labels)
    shift_labels = packed.padded(attention.BLOCK).shift_labels
    output = model(**attention.forward_inputs(packed, config), shift_labels=shift_labels, fused_lm_head=True)
    return output.log_probs.squeeze(0).index_select(0, packed.scored)


def response_logits(model: torch.nn.Module, packed: PackedSequence, config: PreTrainedConfig) -> torch.Tensor:
    """Logits at the positions that predict response tokens, `(R, vocabulary)`."""
    return model(**attention.forward_inputs(packed, config), logits_to_keep=packed.scored).logits.squeeze(0)


def response_logps(model: torch.nn.Module, packed: PackedSequence, config: PreTrainedConfig) -> torch.Tensor:
    """Log-probability of every response, `(S,)` float32; arguments as in `token_logps`."""
    return packed.sum_by_response(token_logps(model, packed, config))


class Scorer:
    """Scores with one model as training does, without gradient: `with Scorer(model) as scorer: scorer.sums(packed)`.

    Inside the block the model is in evaluation mode and attends to packed sequences; behind it, also behind an error, it
    attends to ordinary ones. `kind` is that of `attention.resolve_kind`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, kind: str = "auto"):
        self.model, self.kind = model, attention.resolve_kind(kind, model.device)

    def __enter__(self) -> Self:
        attention.attach(self.model, self.kind)
        self.model.eval()
        return self

    def __exit__(self, *error) -> None:
        attention.attach(self.model, "plain")  # so that the model can generate again

    @torch.no_grad()
    def token_logps(self, packed: PackedSequence) -> list[torch.Tensor]:
        """Log-probability of every token of each response: `(tokens,)` float32, on the CPU."""
        values = token_logps(self.model, send_to_device(packed, self.model.device), self.model.config)
        return [*values.cpu().split(packed.response_lengths.int().tolist())]

    @torch.no_grad()
    def sums(self, packed: PackedSequence) -> torch.Tensor:
        """Log-probability of every response, `(S,)` float32, on the CPU."""
        return response_logps(self.model, send_to_device(packed, self.model.device), self.model.config).cpu()


def by_tokens(items: Iterable, length: Callable[[Any], int] = len, limit: int = TOKENS) -> Iterator[list]:
    """`items` in order, cut into batches whose lengths add up to about `limit`."""
    batch, total = [], 0
    for item in items:
        # An item beyond the limit goes alone, and is not refused.
        if batch and total + length(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += length(item)
    if batch:
        yield batch


def pair_length(row: dict) -> int:
    """Tokens of a tokenised pair."""
    return sum(len(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected"))


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
    scored: dict[str, list[torch.Tensor]] = {}
    with Scorer(model, kind) as scorer:
        for rows in batches:
            packed = pack_pairs(rows)
            columns = {"{}_logps": scorer.sums(packed), "{}_lengths": packed.response_lengths}
            if prior_context is not None:
                columns["prior_{}_logps"] = scorer.sums(pack_priors(rows, prior_context))
            for name, values in columns.items():
                for side, part in zip(("chosen", "rejected"), split_pairs(values), strict=True):
                    scored.setdefault(name.format(side), []).append(part)
    return {name: torch.cat(parts) for name, parts in scored.items()}


@torch.no_grad()
def perturbed_logratios(
    logits: torch.Tensor, reference_logits: torch.Tensor, packed: PackedSequence, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """S(w) - S(l) under epsilon-DPO's two perturbed policies, `(pairs,)` each: (plus, minus).

    plus is proportional to exp((1 + eps) z - eps z_ref), minus to exp((1 - eps) z + eps z_ref), for logits z. Only
    512 rows of the two `(R, vocabulary)` inputs are in float32 at a time.
    """
    sums: dict[float, list[torch.Tensor]] = {epsilon: [], -epsilon: []}
    rows = (values.split(512) for values in (logits, reference_logits, packed.labels))
    for policy, reference, labels in zip(*rows, strict=True):
        for sign, values in sums.items():
            # (1 + e) z - e z_ref = z + e (z - z_ref), and with -e the other one.
            perturbed = policy.float() + sign * (policy.float() - reference.float())
            values.append(-F.cross_entropy(perturbed, labels, reduction="none"))
    plus, minus = (split_pairs(packed.sum_by_response(torch.cat(values))) for values in sums.values())
    return plus[0] - plus[1], minus[0] - minus[1]


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
    packed = token_logps(model, pairs, unwrapped.config)

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
            logps.append(label_logps(logits, ids[start:]))
    return torch.cat(logps)
