"""What is made of tensors lies on their device: shown on `meta`, where tensors have no values, and no device is needed."""

import os

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.file_baton import FileBaton

from rmipo.training import attention, parity, scoring
from rmipo.training.batching import MicroBatch, pack_micro_batch
from rmipo.training.distributed import free_compilations, on_main_process
from rmipo.training.packing import pack_pairs
from tests.helpers.small_models import make_model, make_pairs

META = torch.device("meta")


@pytest.fixture
def micro_batch():
    sides = ("chosen", "rejected")
    rows = [
        pair
        | {f"mismatched_{side}_ids": pair[f"{side}_ids"] for side in sides}
        | {f"ref_{side}_logps": -1.5 for side in sides}
        for pair in make_pairs(3)
    ]
    return pack_micro_batch(rows, MicroBatch((0, 1, 2), 3, 3), {"prior", "mismatched"}, [1, 2])


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
        attention._causal(*torch.zeros(3, 1, 2, 9, 4, device=META), None, 0.0, window=3),
    ]
    assert {tensor.device for tensor in derived} == {META}


def test_the_check_at_the_start(monkeypatch):
    monkeypatch.setitem(scoring.CHUNK, "meta", 2**16)
    model, pairs = make_model("llama").to(META), make_pairs(2)
    responses = pack_pairs(pairs).labels.shape
    with torch.no_grad():
        found = [parity._plain(model, model, pairs, "eager")]
        attention.attach(model, "segment")
        found.append(parity._packed(model, model, pairs, "segment"))
    for scored in found:
        assert scored.logps.device == scored.hidden.device == META and scored.logps.shape == responses


def test_the_first_process_of_another_machine_leaves_it_to_the_main_process(monkeypatch):
    assert on_main_process(lambda: "done") == "done"
    for name, rank in (("process_index", 8), ("local_process_index", 0)):  # one of several machines' processes
        monkeypatch.setitem(PartialState().__dict__, name, rank)
    assert on_main_process(lambda: "done") is None  # what it is told by the main process, which there isn't here


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_of_a_killed_compilation_holds_nobody(tmp_path, monkeypatch, killed):
    """torch waits for it without end, before anything is loaded."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: lock.unlink())  # a compilation that is running ends meanwhile
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    if killed:
        os.utime(lock, (0, 0))
        monkeypatch.setattr("time.sleep", None)
    free_compilations()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    baton.release()
