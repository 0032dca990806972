"""The global batch is the invariant: the same pairs per step whatever the ranks and the micro-batch size."""

import pytest

from rmipo.batching import MicroBatch, StepSampler


def steps(world_size, micro_batch_size, num_pairs=37, global_batch_size=8, epoch=0, seed=3):
    """Per step and rank: the list of micro-batches."""
    samplers = [
        StepSampler(
            num_pairs,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return list(zip(*samplers, strict=True))


def counted(step):
    return sorted(i for rank in step for batch in rank for i in batch.indices[: batch.real])


@pytest.mark.parametrize(
    "world_size, micro_batch_size", [(1, 1), (1, 3), (1, 8), (2, 2), (3, 2), (4, 1), (4, 2), (16, 1)]
)
def test_steps_hold_the_same_pairs_on_any_hardware(world_size, micro_batch_size):
    reference = [counted(step) for step in steps(1, 8)]
    actual = steps(world_size, micro_batch_size)
    assert [counted(step) for step in actual] == reference
    assert sorted(sum(reference, [])) == list(range(37))
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
