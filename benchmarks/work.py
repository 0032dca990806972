"""The work a training step should take: positions that pass through the model, and floating-point operations.

Units: a forward costs 1, its backward 2 (of attention 2.5: it computes the scores again). Gradient checkpointing runs
the forward of the layers once more, up to the last product that backward needs: all but the MLP's down projection.
"""

from typing import NamedTuple

from benchmarks.contenders import PRIOR_CONTEXT, Setup


class Pass(NamedTuple):
    """One forward, with or without gradients."""

    positions: int  # through the layers
    scored: int  # through the LM head
    attended: int  # (query, key) pairs
    gradient: bool


class Work(NamedTuple):
    positions: int
    linear: float  # FLOPs of the layers' matrix products
    head: float
    attention: float

    @property
    def flops(self) -> float:
        return self.linear + self.head + self.attention


def step_work(name: str, pairs: list[dict], setup: Setup) -> Work:
    """Work of one step of the contender `name` on these pairs."""
    sizes = [tuple(len(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")) for pair in pairs]
    responses = [length for _, *both in sizes for length in both]
    if name in ("rmipo", "simpo", "dpo"):
        passes = [_packed([(prompt - 1, both) for prompt, *both in sizes], gradient=True)]
        if name == "rmipo":
            passes.append(_packed([(len(PRIOR_CONTEXT) - 1, responses)], gradient=False))
    else:
        passes = [_padded(len(responses), max(prompt + max(both) for prompt, *both in sizes), gradient=True)]
        if name == "padded-rmipo":
            passes.append(_padded(len(responses), len(PRIOR_CONTEXT) + max(responses), gradient=False))
        if name == "trl-dpo":  # its fused head leaves the last position out
            passes = [passes[0]._replace(scored=passes[0].scored - len(responses))]
    head_units = 4 if name == "trl-dpo" else 3  # that head computes the logits again in backward
    return _sum(_work(part, setup, head_units) for part in passes)


def total(name: str, batches: list[list[dict]], setup: Setup) -> Work:
    return _sum(step_work(name, pairs, setup) for pairs in batches)


def _sum(parts) -> Work:
    return Work(*map(sum, zip(*parts, strict=True)))


def _packed(groups: list[tuple[int, list[int]]], gradient: bool) -> Pass:
    """Shared prefixes once; a branch attends to its prefix and itself, causally."""
    scored = sum(sum(branches) for _, branches in groups)
    attended = 0
    for prefix, branches in groups:
        attended += prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in branches)
    return Pass(scored + sum(prefix for prefix, _ in groups), scored, attended, gradient)


def _padded(rows: int, width: int, gradient: bool) -> Pass:
    """A padding mask keeps SDPA from skipping the future: every position attends to the whole row."""
    return Pass(rows * width, rows * width, rows * width * width, gradient)


def _work(part: Pass, setup: Setup, head_units: int) -> Work:
    config = setup.config()
    width, kv = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    down = setup.hidden * config.intermediate_size
    layer = setup.hidden * (2 * width + 2 * kv) + 3 * down
    per_position, attention_units, head = layer, 1, 1
    if part.gradient:
        recomputed = setup.checkpointing
        per_position, attention_units, head = 3 * layer + recomputed * (layer - down), 3.5 + recomputed, head_units
    return Work(
        positions=part.positions,
        linear=2.0 * setup.layers * part.positions * per_position,
        head=2.0 * setup.hidden * setup.vocabulary * part.scored * head,
        attention=4.0 * width * setup.layers * part.attended * attention_units,
    )
