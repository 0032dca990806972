"""Which pairs make each optimizer step, and how a process cuts its share into micro-batches.

A global batch is the same set of pairs whatever the number of processes and the micro-batch size: results don't change
with the hardware. A micro-batch is a number of pairs, or as many as fit in a number of tokens. Every process runs the
same number of micro-batches (ZeRO-3 gathers parameters in every forward); one that has no pairs left repeats a pair
with no weight.
"""

import heapq
import itertools
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


class MicroBatch(NamedTuple):
    indices: tuple[int, ...]  # rows of the dataset
    real: int  # how many of them count: all, or 0 for a repeated pair without weight
    step_pairs: int  # pairs in the whole optimizer step, over all processes


@dataclass(eq=False)
class StepSampler(Sampler):
    """Yields one optimizer step at a time: the list of this process's micro-batches.

    The order depends on seed and epoch alone; the last step of an epoch takes what is left.
    """

    num_pairs: int
    global_batch_size: int  # pairs per optimizer step over all processes
    micro_batch_size: int  # pairs per forward on one process
    rank: int
    world_size: int
    seed: int | None  # None keeps the dataset's order
    max_tokens: int | None = None  # packed positions per forward, in place of `micro_batch_size`
    pair_tokens: Sequence[int] = ()  # packed positions of each pair
    regroups: str = "nothing"  # what moves between processes, see `Objective.regroups`
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

    def micro_batches(self, step: list[int]) -> list[MicroBatch]:
        """This process's micro-batches of the pairs in `step`."""
        if self.max_tokens is not None:
            parts = split_by_tokens(step, self.pair_tokens, self.max_tokens, self.world_size)
        else:
            starts = range(0, math.ceil(len(step) / self.world_size), self.micro_batch_size)
            shares = [step[rank :: self.world_size] for rank in range(self.world_size)]
            # The micro-batches of a row run at the same time.
            rows = [[share[start : start + self.micro_batch_size] for share in shares] for start in starts]
            if self.regroups == "pairs":
                rows = [deal(list(itertools.chain(*row)), self.pair_tokens, [*map(len, row)]) for row in rows]
            parts = list(itertools.chain(*rows))
            if self.regroups == "micro-batches":  # of similar length side by side
                parts.sort(key=lambda part: -sum(self.pair_tokens[pair] for pair in part))
        parts = parts[self.rank :: self.world_size]  # parts of one forward stand side by side
        return [MicroBatch(tuple(part) or (step[0],), len(part), len(step)) for part in parts]


def deal(pairs: list[int], tokens: Sequence[int], room: list[int]) -> list[list[int]]:
    """Divide `pairs` into parts that have room for so many pairs each: longest first, each to the shortest part so far.

    `tokens`: per pair of the dataset.
    """
    parts: list[list[int]] = [[] for _ in room]
    open_parts = [(0, place) for place, size in enumerate(room) if size]  # a heap of (tokens, part)
    for pair in sorted(pairs, key=lambda pair: (-tokens[pair], pair)):
        load, place = heapq.heappop(open_parts)
        parts[place].append(pair)
        if len(parts[place]) < room[place]:
            heapq.heappush(open_parts, (load + tokens[pair], place))
    return parts


def split_by_tokens(pairs: list[int], tokens: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Divide `pairs` into few parts that hold at most `limit` tokens each; of similar length, longest first.

    The number of parts is a multiple of `multiple`; some may be empty. A pair with more tokens goes alone.
    """
    fewest = math.ceil(sum(min(tokens[pair], limit) for pair in pairs) / limit / multiple)
    for count in range(fewest * multiple, len(pairs) + multiple, multiple):
        parts = deal(pairs, tokens, [len(pairs)] * count)
        if all(len(part) <= 1 or sum(tokens[pair] for pair in part) <= limit for part in parts):
            break
    return sorted(parts, key=lambda part: -sum(tokens[pair] for pair in part))


def packed_lengths(dataset) -> list[int]:
    """Packed positions that each pair of a tokenised dataset takes."""
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) - 1 + len(chosen) + len(rejected) for prompt, chosen, rejected in zip(*columns, strict=True)]


class PackedMicroBatch(NamedTuple):
    """A micro-batch as the model and the objective read it."""

    pairs: PackedSequence
    prior: PackedSequence | None  # the responses without their prompts, where the objective needs log pi(y)
    mismatched: PackedSequence | None  # the responses of other pairs to these prompts, where it needs them (KTO)
    scores: dict[str, Tensor]  # computed before training: a field of PairScores -> (pairs,)
    rows: list[int]  # where the pairs stand in the source
    cut: MicroBatch


class PairDataset(Dataset):
    """Tokenised pairs; `dataset[micro_batch]` has them packed, with what of "prior" and "mismatched" is in `needs`."""

    def __init__(self, tokenized: datasets.Dataset, needs: Collection[str], prior_context: list[int] | None):
        self.tokenized, self.needs, self.prior_context = tokenized, needs, prior_context
        self.scores: dict[str, Tensor] = {}  # computed before training: a field of PairScores -> (len(self),)

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, cut: MicroBatch) -> PackedMicroBatch:
        return self.pack(cut, self.needs)

    def pack(self, cut: MicroBatch, needs: Collection[str]) -> PackedMicroBatch:
        rows = [self.tokenized[index] for index in cut.indices]
        # Responses of the next row, not of a random one: KTO's reference terms are scored once, before training.
        partners = [self.tokenized[(index + 1) % len(self)] for index in cut.indices]
        others = [partner | {"prompt_ids": row["prompt_ids"]} for row, partner in zip(rows, partners, strict=True)]
        return PackedMicroBatch(
            pairs=pack_pairs(rows),
            prior=pack_priors(rows, self.prior_context) if "prior" in needs else None,
            mismatched=pack_pairs(others) if "mismatched" in needs else None,
            scores={name: values[list(cut.indices)] for name, values in self.scores.items()},
            rows=[row["row"] for row in rows],
            cut=cut,
        )
