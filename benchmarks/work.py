"""The work a training step should take: positions that pass through the model, and floating-point operations.

Units: a forward costs 1, its backward 2 (of attention 2.5: it computes the scores again). Gradient checkpointing runs
the forward of the layers once more, up to the last product that backward needs: all but the MLP's down projection.
"""

from typing import NamedTuple

from benchmarks.contenders import PRIOR_CONTEXT, Setup


class Work(NamedTuple):
    positions: int
    linear: float  # FLOPs of the layers' matrix products
    head: float
    attention: float

    @property
    def flops(self) -> float:
        return self.linear + self.head + self.attention


def total(name: str, batches: list[list[dict]], setup: Setup) -> Work:
    """Work of the contender `name` on these batches, one step each."""
    return Work(*map(sum, zip(*(step_work(name, pairs, setup) for pairs in batches), strict=True)))


def step_work(name: str, pairs: list[dict], setup: Setup) -> Work:
    sizes = [tuple(len(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")) for pair in pairs]
    responses = [length for _, *both in sizes for length in both]
    rows, head_units = len(responses), 3
    if name in ("rmipo", "simpo", "dpo"):
        main = _packed([(prompt - 1, both) for prompt, *both in sizes])
        prior = _packed([(len(PRIOR_CONTEXT) - 1, responses)])
    else:
        main = _padded(rows, max(prompt + max(both) for prompt, *both in sizes))
        prior = _padded(rows, len(PRIOR_CONTEXT) + max(responses))
    if name == "trl-dpo":  # its fused head leaves the last position out, and computes the logits again in backward
        main, head_units = (main[0], main[1] - rows, main[2]), 4
    work = _work(*main, setup, head_units)
    if name in ("rmipo", "padded-rmipo"):  # their second pass
        work = Work(*map(sum, zip(work, _work(*prior, setup, 1, gradient=False), strict=True)))
    return work


def _packed(groups: list[tuple[int, list[int]]]) -> tuple[int, int, int]:
    """Positions, those of them that are scored, and (query, key) pairs where shared prefixes run once.

    A branch attends to its prefix and itself, causally.
    """
    scored = sum(sum(branches) for _, branches in groups)
    attended = 0
    for prefix, branches in groups:
        attended += prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in branches)
    return scored + sum(prefix for prefix, _ in groups), scored, attended


def _padded(rows: int, width: int) -> tuple[int, int, int]:
    """A padding mask keeps SDPA from skipping the future: every position attends to the whole row."""
    return rows * width, rows * width, rows * width * width


def _work(positions: int, scored: int, attended: int, setup: Setup, head_units: int, gradient: bool = True) -> Work:
    config = setup.config()
    width, kv = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    down = setup.hidden * config.intermediate_size
    layer = setup.hidden * (2 * width + 2 * kv) + 3 * down
    recomputed = gradient and setup.checkpointing
    return Work(
        positions=positions,
        linear=2.0 * setup.layers * positions * ((3 if gradient else 1) * layer + recomputed * (layer - down)),
        head=2.0 * setup.hidden * setup.vocabulary * scored * head_units,
        attention=4.0 * width * setup.layers * attended * ((3.5 if gradient else 1) + recomputed),
    )
