"""The global batch is the invariant: the same pairs per step whatever the processes and the micro-batch size.

What is made of tensors lies on their device: shown on `meta`, where tensors have no values, and no device is needed.
"""

import itertools
import math

import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from rmipo.training import attention
from rmipo.training.batching import MicroBatch, PairDataset, StepSampler, packed_lengths, split_by_tokens
from rmipo.training.scoring import by_tokens
from tests.helpers.small_models import make_pairs


def steps(world_size, micro_batch_size, num_pairs=37, global_batch_size=8, epoch=0, seed=3, **tokens):
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "world_size": world_size}
    samplers = [StepSampler(num_pairs, rank=rank, seed=seed, **sizes, **tokens) for rank in range(world_size)]
    for sampler in samplers if epoch else ():
        sampler.set_epoch(epoch)
    found = list(zip(*samplers, strict=True))
    assert {len(sampler) for sampler in samplers} == {len(found)}, "the trainer plans its steps by this"
    return found


def counted(step):
    return sorted(i for rank in step for batch in rank for i in batch.indices[: batch.real])


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 1), (1, 3), (2, 2), (3, 2), (4, 1), (16, 1)])
def test_steps_hold_the_same_pairs_on_any_hardware(world_size, micro_batch_size):
    reference = [counted(step) for step in steps(1, 8)]
    actual = steps(world_size, micro_batch_size)
    assert [counted(step) for step in actual] == reference
    assert sorted(itertools.chain(*reference)) == list(range(37))
    assert [len(step) for step in reference] == [8, 8, 8, 8, 5]
    for step, pairs in zip(actual, reference, strict=True):
        forwards = math.ceil(math.ceil(len(pairs) / world_size) / micro_batch_size)
        assert {len(rank) for rank in step} == {forwards}, "every rank runs the same number of forwards, and no more"
        assert {batch.step_pairs for rank in step for batch in rank} == {len(pairs)}
        assert all(len(batch.indices) <= micro_batch_size for rank in step for batch in rank)


def test_order_depends_on_seed_and_epoch_alone():
    def order(**arguments):
        return [i for (rank,) in steps(1, 8, **arguments) for batch in rank for i in batch.indices]

    orders = {both: torch.randperm(37, generator=torch.Generator().manual_seed(both)).tolist() for both in (0, 3, 5)}
    assert order(seed=0) == orders[0]
    assert order(seed=3) == order(seed=1, epoch=2) == orders[3]
    assert order(seed=3, epoch=2) == order(seed=5) == orders[5]
    assert order(seed=None) == order(seed=None, epoch=1) == list(range(37))


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
        # The ranks wait for each other: what they run at the same time is of similar length.
        loads = [[sum(LENGTHS[i] for i in batch.indices[: batch.real]) for batch in rank] for rank in step]
        in_turn = [load for at_once in zip(*loads, strict=True) for load in at_once]
        assert in_turn == sorted(in_turn, reverse=True)


def test_parts_by_tokens_are_few_and_of_similar_length():
    assert split_by_tokens([0, 1, 2, 3], [6, 4, 5, 5], limit=10, multiple=1) == [[0, 1], [2, 3]]
    assert split_by_tokens([0, 1, 2, 3, 4], [50, 3, 3, 2, 1], limit=10, multiple=2) == [[0], [1, 2, 3, 4]]
    assert split_by_tokens([4, 7], {4: 9, 7: 2}, limit=10, multiple=3) == [[4], [7], []]
    for pairs in (range(6), reversed(range(6))):  # a pair that is too long alone: the others are levelled
        assert split_by_tokens(list(pairs), [50, 5, 4, 2, 2, 2], limit=10, multiple=1) == [[0], [2, 3, 5], [1, 4]]
    parts = split_by_tokens(list(range(37)), LENGTHS, limit=300, multiple=2)
    loads = [sum(LENGTHS[i] for i in part) for part in parts]
    assert 6 < sum(LENGTHS) / 300 < 7 and len(parts) == 8
    assert max(loads) - min(loads) <= min(LENGTHS) + 5
    assert loads == sorted(loads, reverse=True)
    assert split_by_tokens([0, 1, 2, 3], [7, 5, 3, 3], limit=10, multiple=1) == [[0, 3], [1, 2]]  # none does: 10 and 8
    # Two parts would be 6 4 4 and 6 4: 14 is too long.
    assert len(split_by_tokens([0, 1, 2, 3, 4], [6, 6, 4, 4, 4], limit=12, multiple=1)) == 3


def test_scored_batches_keep_the_order_and_the_limit():
    assert [*by_tokens(["aaa", "bb", "c", "dddddd", "ee"], limit=5)] == [["aaa", "bb"], ["c"], ["dddddd"], ["ee"]]


def test_pairs_are_dealt_to_processes_by_length_and_one_without_a_pair_repeats_some_without_weight():
    """Two processes, micro-batches of two: longest first, each to the process with the fewest tokens that has room."""
    tokens = [10, 90, 20, 80, 50, 60, 5]
    options = {"world_size": 2, "micro_batch_size": 2, "num_pairs": 7, "global_batch_size": 7, "seed": None}
    (came,) = steps(**options)
    assert [[batch.indices for batch in rank] for rank in came] == [[(0, 2), (4, 6)], [(1, 3), (5,)]]
    (dealt,) = steps(**options, pair_tokens=tokens, regroups="pairs")
    assert [[batch.indices for batch in rank] for rank in dealt] == [[(1, 0), (5, 6)], [(3, 2), (4,)]]
    (rows,) = steps(**options, pair_tokens=tokens, regroups="micro-batches")
    assert [[batch.indices for batch in rank] for rank in rows] == [[(1, 3), (4, 6)], [(5,), (0, 2)]]
    assert counted(came) == counted(dealt) == counted(rows) == list(range(7))
    _, step = steps(world_size=4, micro_batch_size=2, num_pairs=10, global_batch_size=8, seed=None)
    assert step == tuple([MicroBatch((pair,), real, 2)] for pair, real in ((8, 1), (9, 1), (8, 0), (8, 0)))


def test_a_micro_batch_holds_what_its_objective_needs():
    rows = [
        {"prompt_ids": [1, i], "chosen_ids": [10 + i], "rejected_ids": [20 + i, 5], "row": 100 - i} for i in range(3)
    ]
    dataset = PairDataset(Dataset.from_list(rows), {"reference", "initial_prior"}, [9, 9])
    dataset.scores = {"ref_chosen_logps": torch.arange(3) / 2}
    cut = MicroBatch((2, 0), 0, 8)
    batch = dataset[cut]
    assert batch.pairs.labels.tolist() == [12, 22, 5, 10, 20, 5]
    assert batch.prior is None and batch.mismatched is None
    assert batch.scores["ref_chosen_logps"].tolist() == [1.0, 0.0]
    assert batch.rows == [98, 100] and batch.cut == cut
    batch = dataset.pack(cut, {"prior", "mismatched"})
    assert batch.prior.input_ids.tolist() == [[9, 9, 9, 22, 9, 9, 20]]
    assert batch.mismatched.labels.tolist() == [10, 20, 5, 11, 21, 5]
    assert batch.mismatched.input_ids.tolist() == [[1, 2, 2, 20, 1, 0, 0, 21]]
    dataset = {"prompt_ids": [[1, 2, 3], [1]], "chosen_ids": [[1], [1, 2]], "rejected_ids": [[1, 2], [1]]}
    assert packed_lengths(dataset) == [5, 3]


META = torch.device("meta")


@pytest.fixture
def micro_batch():
    dataset = PairDataset(make_pairs(3), {"prior", "mismatched"}, [1, 2])
    dataset.scores = {f"ref_{side}_logps": torch.zeros(3) for side in ("chosen", "rejected")}
    return dataset[MicroBatch((0, 1, 2), 3, 3)]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_a_micro_batch_moves_with_all_that_is_derived_from_it(micro_batch, monkeypatch):
    assert len(tensors(micro_batch)) == 3 * 7 + 2
    assert {tensor.device for tensor in tensors(send_to_device(micro_batch, META))} == {META}
    assert {tensor.device.type for tensor in tensors(micro_batch)} == {"cpu"}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # only beside a GPU is there such memory
    for pinned, tensor in zip(tensors(pin_memory([micro_batch])), tensors(micro_batch), strict=True):
        assert torch.equal(pinned, tensor + 1)
    packed = send_to_device(micro_batch, META).pairs.padded(attention.BLOCK)
    mask = attention.block_mask(packed, 5)
    derived = [
        packed.shift_labels,
        packed.response_lengths,
        packed.sum_by_response(packed.labels),
        attention.dense_mask(packed, 5),
        mask.kv_num_blocks,
        mask.kv_indices,
        attention._causal(*torch.zeros(3, 1, 2, 9, 4, device=META), None, window=3),
    ]
    assert {tensor.device for tensor in derived} == {META}
