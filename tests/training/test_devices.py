"""What is made of tensors lies on their device: shown on `meta`, where tensors have no values, and no device is needed."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from rmipo.training import attention
from rmipo.training.batching import MicroBatch, PairDataset
from tests.helpers.small_models import make_pairs

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
