"""The global batch is the invariant: the same pairs per step whatever the processes and the micro-batch size."""

import itertools

import pytest
import torch
from datasets import Dataset

from rmipo.training.batching import MicroBatch, PairDataset, StepSampler, packed_lengths, split_by_tokens


def steps(world_size, micro_batch_size, num_pairs=37, global_batch_size=8, epoch=0, seed=3, **tokens):
    """Per step and rank: the list of micro-batches."""
    samplers = [
        StepSampler(
            num_pairs,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            **tokens,
        )
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = list(zip(*samplers, strict=True))
    assert {len(sampler) for sampler in samplers} == {len(found)}, "the trainer plans its steps by this"
    return found


def counted(step):
    return sorted(i for rank in step for batch in rank for i in batch.indices[: batch.real])


@pytest.mark.parametrize(
    "world_size, micro_batch_size", [(1, 1), (1, 3), (1, 8), (2, 2), (3, 2), (4, 1), (4, 2), (16, 1)]
)
def test_steps_hold_the_same_pairs_on_any_hardware(world_size, micro_batch_size):
    reference = [counted(step) for step in steps(1, 8)]
    actual = steps(world_size, micro_batch_size)
    assert [counted(step) for step in actual] == reference
    assert sorted(itertools.chain(*reference)) == list(range(37))
    assert [len(step) for step in reference] == [8, 8, 8, 8, 5]
    for step, pairs in zip(actual, reference, strict=True):
        assert len({len(rank) for rank in step}) == 1, "every rank runs the same number of forwards"
        assert {batch.step_pairs for rank in step for batch in rank} == {len(pairs)}
        assert all(len(batch.indices) <= micro_batch_size for rank in step for batch in rank)


def test_a_rank_with_nothing_left_repeats_a_pair_without_weight():
    (step,) = steps(world_size=4, micro_batch_size=2, num_pairs=2, global_batch_size=8, seed=None)
    assert step == (
        [MicroBatch((0,), 1, 2)],
        [MicroBatch((1,), 1, 2)],
        [MicroBatch((0,), 0, 2)],
        [MicroBatch((0,), 0, 2)],
    )


def test_order_depends_on_seed_and_epoch_alone():
    assert steps(1, 2, epoch=1) == steps(1, 2, epoch=1)
    assert counted(steps(1, 2, epoch=0)[0]) != counted(steps(1, 2, epoch=1)[0])
    assert counted(steps(1, 2, seed=4)[0]) != counted(steps(1, 2, seed=3)[0])
    assert counted(steps(1, 2, seed=None)[0]) == list(range(8))


LENGTHS = [(37 * i * i + 11) % 90 + 5 for i in range(37)]  # 5 to 94


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("max_tokens", [1, 100, 250, 10**6])
def test_micro_batches_by_tokens_hold_the_same_pairs(world_size, max_tokens):
    actual = steps(world_size, 2, max_tokens=max_tokens, pair_tokens=LENGTHS)
    assert [counted(step) for step in actual] == [counted(step) for step in steps(1, 8)]
    for step in actual:
        assert len({len(rank) for rank in step}) == 1, "every rank runs the same number of forwards"
        for batch in (batch for rank in step for batch in rank):
            assert len(batch.indices) == 1 or sum(LENGTHS[i] for i in batch.indices) <= max_tokens


def test_parts_by_tokens_are_few_and_of_similar_length():
    assert split_by_tokens([0, 1, 2, 3], [6, 4, 5, 5], limit=10, multiple=1) == [[0, 1], [2, 3]]
    assert split_by_tokens([0, 1, 2, 3, 4], [50, 3, 3, 2, 1], limit=10, multiple=2) == [[0], [1, 2, 3, 4]]
    assert split_by_tokens([4, 7], {4: 9, 7: 2}, limit=10, multiple=3) == [[4], [7], []]
    parts = split_by_tokens(list(range(37)), LENGTHS, limit=300, multiple=2)
    loads = [sum(LENGTHS[i] for i in part) for part in parts]
    assert 6 < sum(LENGTHS) / 300 < 7 and len(parts) == 8
    assert max(loads) - min(loads) <= min(LENGTHS) + 5
    assert loads == sorted(loads, reverse=True)


def test_where_levelling_overflows_the_first_fit_stays():
    # Levelled, the parts would be 6 4 4 and 6 4: 14 is too long.
    parts = split_by_tokens([0, 1, 2, 3, 4], [6, 6, 4, 4, 4], limit=12, multiple=1)
    assert sorted(map(sorted, parts)) == [[0, 1], [2, 3, 4]]


def test_scores_stand_at_a_pairs_place_whatever_its_row_in_the_source():
    dataset = PairDataset(Dataset.from_list([{"prompt_ids": [i], "row": 100 - i} for i in range(5)]))
    dataset.scores = {"ref_chosen_logps": torch.arange(5) / 2}
    rows, cut = dataset[MicroBatch((3, 1), 2, 2)]
    assert [row["ref_chosen_logps"] for row in rows] == [1.5, 0.5] and cut.indices == (3, 1)
    assert [(row["prompt_ids"], row["row"]) for row in rows] == [([3], 97), ([1], 99)]


def test_a_pair_is_mismatched_with_the_next_one_and_the_last_with_the_first():
    rows = [{"prompt_ids": [i], "chosen_ids": [10 + i], "rejected_ids": [20 + i], "row": i} for i in range(3)]
    found, _ = PairDataset(Dataset.from_list(rows), mismatched=True)[MicroBatch((2, 0), 2, 2)]
    sides = [(row["prompt_ids"], row["mismatched_chosen_ids"], row["mismatched_rejected_ids"]) for row in found]
    assert sides == [([2], [10], [20]), ([0], [11], [21])]


def test_packed_lengths():
    dataset = {"prompt_ids": [[1, 2, 3], [1]], "chosen_ids": [[1], [1, 2]], "rejected_ids": [[1, 2], [1]]}
    assert packed_lengths(dataset) == [5, 3]
