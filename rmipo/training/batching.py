"""Which pairs make each optimizer step, and how a process cuts its share into micro-batches.

A global batch is the same set of pairs whatever the number of processes and the micro-batch size: results don't change
with the hardware. A micro-batch is a number of pairs, or as many as fit in a number of tokens. Every process runs the
same number of micro-batches (ZeRO-3 gathers parameters in every forward); one that has no pairs left repeats a pair
with no weight.
"""

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rmipo.training.packing import PackedSequence, pack_pairs, pack_priors

# Micro-batches in one forward without gradient: under ZeRO-3 the parameters are gathered that much less often than for
# one at a time, while the logits of a whole step would not fit (32 long pairs of Llama-3: 34 GB).
HOISTED_MICRO_BATCHES = 4
RESPONSES = ("chosen", "rejected")


class MicroBatch(NamedTuple):
    indices: tuple[int, ...]  # rows of the dataset
    real: int  # how many of them count: all, or 0 for a repeated pair without weight
    step_pairs: int  # pairs in the whole optimizer step, over all processes


@dataclass(eq=False)
class StepSampler(Sampler):
    """Yields one optimizer step at a time: the list of this process's micro-batches.

    Attributes:
        num_pairs: rows in the dataset; the last step takes what is left.
        global_batch_size: pairs per optimizer step over all processes.
        micro_batch_size: pairs per forward on one process.
        seed: of the order; None keeps the dataset's. The order depends on seed and epoch alone.
        max_tokens: packed positions per forward, in place of `micro_batch_size`; a longer pair goes alone.
        pair_tokens: packed positions of each pair (`packed_lengths`).
        regroups: what moves between processes where micro-batches are counted by pairs; see `Objective.regroups`.
    """

    num_pairs: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int | None
    max_tokens: int | None = None
    pair_tokens: Sequence[int] = ()
    regroups: str = "nothing"
    epoch: int = 0

    @property
    def batch_sampler(self) -> "StepSampler":
        """Itself: `Trainer` calls `set_epoch` one level below a dataloader's batch sampler, where accelerate has it."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_pairs / self.global_batch_size)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if self.seed is None:
            order = list(range(self.num_pairs))
        else:
            # Every process draws the same order, so nothing has to be exchanged.
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
        for start in range(0, self.num_pairs, self.global_batch_size):
            yield self.micro_batches(order[start : start + self.global_batch_size])

    def _tokens(self, part: list[int]) -> int:
        return sum(self.pair_tokens[pair] for pair in part)

    def micro_batches(self, step: list[int]) -> list[MicroBatch]:
        """This process's micro-batches of the pairs in `step`."""
        if self.max_tokens is not None:
            parts = split_by_tokens(step, self.pair_tokens, self.max_tokens, self.world_size)
        else:
            # A row of `world_size` micro-batches after the other; those of a row run at the same time.
            starts = range(0, math.ceil(len(step) / self.world_size), self.micro_batch_size)
            shares = [step[rank :: self.world_size] for rank in range(self.world_size)]
            parts = [share[start : start + self.micro_batch_size] for start in starts for share in shares]
            if self.regroups == "micro-batches":
                parts.sort(key=lambda part: -self._tokens(part))  # of similar length side by side
            elif self.regroups == "pairs":
                rows = (parts[row : row + self.world_size] for row in range(0, len(parts), self.world_size))
                parts = [part for row in rows for part in deal(row, self.pair_tokens)]
        parts = parts[self.rank :: self.world_size]  # parts of one forward stand side by side
        return [MicroBatch(tuple(part) or (step[0],), len(part), len(step)) for part in parts]


def deal(parts: list[list[int]], tokens: Sequence[int]) -> list[list[int]]:
    """The same pairs in parts with the same numbers of pairs, and of tokens as equal as this rule makes them.

    Longest first, each to the part with the fewest tokens that has room.
    """
    dealt: list[list[int]] = [[] for _ in parts]
    loads = [0] * len(parts)
    for pair in sorted((pair for part in parts for pair in part), key=lambda pair: (-tokens[pair], pair)):
        place = min((i for i, part in enumerate(parts) if len(dealt[i]) < len(part)), key=lambda i: (loads[i], i))
        dealt[place].append(pair)
        loads[place] += tokens[pair]
    return dealt


def packed_lengths(dataset) -> list[int]:
    """Packed positions that each pair of a tokenised dataset takes."""
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) - 1 + len(chosen) + len(rejected) for prompt, chosen, rejected in zip(*columns, strict=True)]


def split_by_tokens(pairs: list[int], tokens: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Divide `pairs` into as few parts as hold at most `limit` tokens each; of similar length, longest first.

    Args:
        tokens: per pair of the dataset. A pair with more than `limit` gets a part of its own.
        multiple: the number of parts is a multiple of it; parts may be empty.
    """
    longest_first = sorted(pairs, key=lambda pair: (-tokens[pair], pair))
    fitted: list[list[int]] = []  # first fit: at most 11/9 of the fewest parts possible
    loads: list[int] = []
    for pair in longest_first:
        part = next((i for i, load in enumerate(loads) if load + tokens[pair] <= limit), len(loads))
        if part == len(loads):
            fitted.append([])
            loads.append(0)
        fitted[part].append(pair)
        loads[part] += tokens[pair]
    fitted += [[] for _ in range(-len(fitted) % multiple)]

    level: list[list[int]] = [[] for _ in fitted]  # the same number of parts, each pair to the shortest so far
    shortest = [(0, part) for part in range(len(level))]
    for pair in longest_first:
        load, part = heapq.heappop(shortest)
        level[part].append(pair)
        heapq.heappush(shortest, (load + tokens[pair], part))
    if any(load > limit and len(level[part]) > 1 for load, part in shortest):
        level = fitted
    return sorted(level, key=lambda part: -sum(tokens[pair] for pair in part))


class PairDataset(Dataset):
    """Tokenised pairs indexed by micro-batch: gives `(rows, micro_batch)`, each row a dict.

    Args:
        tokenized: from `data.tokenize_pairs`.
        mismatched: also give each row the responses of the dataset's next row (KTO), as `mismatched_chosen_ids` and
            `mismatched_rejected_ids`. The partner is fixed by the dataset, so its reference can be scored beforehand.
    """

    def __init__(self, tokenized: datasets.Dataset, mismatched: bool = False):
        self.tokenized = tokenized
        self.mismatched = mismatched
        self.scores: dict[str, Tensor] = {}  # computed before training: a field of PairScores -> (len(self),)

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[list[dict], MicroBatch]:
        rows = self._rows(micro_batch.indices)
        if self.mismatched:
            # The next row, not a random one: KTO's reference terms are scored once, before training.
            partners = self._rows([(i + 1) % len(self) for i in micro_batch.indices])
            for row, partner in zip(rows, partners, strict=True):
                row |= {f"mismatched_{side}_ids": partner[f"{side}_ids"] for side in RESPONSES}
        for name, values in self.scores.items():
            for row, index in zip(rows, micro_batch.indices, strict=True):
                row[name] = values[index].item()
        return rows, micro_batch

    def _rows(self, indices) -> list[dict]:
        columns = self.tokenized[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class PackedMicroBatch(NamedTuple):
    """A micro-batch as the model and the objective read it."""

    pairs: PackedSequence
    prior: PackedSequence | None  # the responses without their prompts, where the objective needs log pi(y)
    mismatched: PackedSequence | None  # the responses of other pairs to these prompts, where it needs them (KTO)
    scores: dict[str, Tensor]  # computed before training: a field of PairScores -> (pairs,)
    rows: list[int]  # where the pairs stand in the source
    cut: MicroBatch


def pack_step(
    step: list[tuple[list[dict], MicroBatch]], needs: Collection[str], prior_context: list[int] | None
) -> list[PackedMicroBatch]:
    """Pack the micro-batches of one optimizer step."""
    return [pack_micro_batch(rows, cut, needs, prior_context) for rows, cut in step]


def pack_micro_batch(
    rows: list[dict], cut: MicroBatch, needs: Collection[str], prior_context: list[int] | None
) -> PackedMicroBatch:
    """Pack the rows of a micro-batch (an item of `PairDataset`) with what of "prior" and "mismatched" is in `needs`."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name.endswith("_logps")}
    mismatched = ("mismatched_chosen_ids", "mismatched_rejected_ids")
    return PackedMicroBatch(
        pairs=pack_pairs(rows),
        prior=pack_priors(rows, prior_context) if "prior" in needs else None,
        mismatched=pack_pairs(rows, *mismatched) if "mismatched" in needs else None,
        scores={name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()},
        rows=[row["row"] for row in rows],
        cut=cut,
    )
