"""Which pairs make each optimizer step, and how a rank cuts its share into micro-batches.

A global batch is the same set of pairs whatever the number of ranks and the micro-batch size: results don't move when
the hardware does. A micro-batch is a number of pairs, or as many as fit in a number of tokens. Every rank runs the same
number of micro-batches (ZeRO-3 gathers parameters in every forward); a rank that has none left repeats a pair with no
weight.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

# Micro-batches in one forward without gradient: under ZeRO-3 the parameters are gathered that much less often than for
# one at a time, while the logits of a whole step would not fit (32 long pairs of Llama-3: 34 GB).
HOISTED_MICRO_BATCHES = 4


class MicroBatch(NamedTuple):
    indices: tuple[int, ...]  # rows of the dataset
    real: int  # how many of them count: all, or 0 for a repeated pair without weight
    step_pairs: int  # pairs in the whole optimizer step, over all ranks


class StepSampler(Sampler):
    """Yields one optimizer step at a time: the list of this rank's micro-batches.

    Args:
        num_pairs: rows in the dataset; the last step takes what is left.
        global_batch_size: pairs per optimizer step over all ranks.
        micro_batch_size: pairs per forward on one rank.
        seed: of the order; None keeps the dataset's. The order depends on seed and epoch alone.
        max_tokens: packed positions per forward, in place of `micro_batch_size`; a longer pair goes alone.
        pair_tokens: packed positions of each pair (`packed_lengths`); read where `max_tokens` is set.
    """

    def __init__(
        self,
        num_pairs: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int | None,
        max_tokens: int | None = None,
        pair_tokens: Sequence[int] = (),
    ):
        self.num_pairs = num_pairs
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.max_tokens = max_tokens
        self.pair_tokens = pair_tokens
        self.epoch = 0

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
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
        for start in range(0, self.num_pairs, self.global_batch_size):
            yield self.micro_batches(order[start : start + self.global_batch_size])

    def micro_batches(self, step: list[int]) -> list[MicroBatch]:
        """This rank's micro-batches of the pairs in `step`."""
        if self.max_tokens is None:
            share = step[self.rank :: self.world_size]
            largest_share = math.ceil(len(step) / self.world_size)
            starts = range(0, largest_share, self.micro_batch_size)
            rows = [share[start : start + self.micro_batch_size] for start in starts]
        else:
            rows = token_rows(step, self.pair_tokens, self.max_tokens, self.world_size)[self.rank :: self.world_size]
        return [MicroBatch(tuple(row) or (step[0],), len(row), len(step)) for row in rows]


def packed_lengths(dataset) -> list[int]:
    """Positions that each pair of a tokenised dataset takes in a packed row."""
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) - 1 + len(chosen) + len(rejected) for prompt, chosen, rejected in zip(*columns, strict=True)]


def token_rows(pairs: list[int], tokens: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Divide `pairs` into as few rows as hold at most `limit` tokens each; rows of similar length, longest first.

    Args:
        tokens: per pair of the dataset. A pair with more than `limit` gets a row of its own.
        multiple: the number of rows is a multiple of it; rows may be empty.
    """
    longest_first = sorted(pairs, key=lambda pair: (-tokens[pair], pair))
    fitted: list[list[int]] = []  # first fit: at most 11/9 of the fewest rows possible
    loads: list[int] = []
    for pair in longest_first:
        row = next((i for i, load in enumerate(loads) if load + tokens[pair] <= limit), len(loads))
        if row == len(loads):
            fitted.append([])
            loads.append(0)
        fitted[row].append(pair)
        loads[row] += tokens[pair]
    fitted += [[] for _ in range(-len(fitted) % multiple)]

    level: list[list[int]] = [[] for _ in fitted]  # the same number of rows, each pair to the shortest so far
    shortest = [(0, row) for row in range(len(level))]
    for pair in longest_first:
        load, row = heapq.heappop(shortest)
        level[row].append(pair)
        heapq.heappush(shortest, (load + tokens[pair], row))
    if any(load > limit and len(level[row]) > 1 for load, row in shortest):
        level = fitted
    return sorted(level, key=lambda row: -sum(tokens[pair] for pair in row))


class MicroBatchRows(Dataset):
    """A tokenised dataset indexed by micro-batch: gives `(rows, micro_batch)` with rows as dicts.

    Args:
        dataset: from `data.tokenize_pairs`.
        mismatched: also give each row the responses of the dataset's next row (KTO), as `mismatched_chosen_ids` and
            `mismatched_rejected_ids`. The partner is fixed by the dataset, so its reference can be scored beforehand.
    """

    def __init__(self, dataset, mismatched: bool = False):
        self.dataset = dataset
        self.mismatched = mismatched
        self.columns: dict[str, torch.Tensor] = {}  # further per-row values, `(len(dataset),)` each

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[list[dict], MicroBatch]:
        rows = self._rows(micro_batch.indices)
        if self.mismatched:
            partners = self._rows([(i + 1) % len(self) for i in micro_batch.indices])
            for row, partner in zip(rows, partners, strict=True):
                row |= {f"mismatched_{side}": partner[side] for side in ("chosen_ids", "rejected_ids")}
        for name, values in self.columns.items():
            for row, index in zip(rows, micro_batch.indices, strict=True):
                row[name] = values[index].item()
        return rows, micro_batch

    def _rows(self, indices) -> list[dict]:
        columns = self.dataset[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
