"""What a process knows of the others. Two real processes: test_token_batches.py."""

import pytest
import torch
from accelerate import PartialState

from rmipo.training.distributed import Processes, on_main_process


def place(monkeypatch, rank: int, local_rank: int) -> None:
    """This process as one of several machines' processes."""
    monkeypatch.setitem(PartialState().__dict__, "process_index", rank)
    monkeypatch.setitem(PartialState().__dict__, "local_process_index", local_rank)


def test_the_rank_is_that_among_the_processes_of_all_machines(monkeypatch):
    place(monkeypatch, rank=9, local_rank=1)
    assert Processes().rank == 9


def test_the_first_process_of_another_machine_leaves_it_to_the_main_process(monkeypatch):
    assert on_main_process(lambda: "done") == "done"
    place(monkeypatch, rank=8, local_rank=0)
    assert on_main_process(lambda: "done") is None  # what it is told by the main process, which there isn't here


@pytest.mark.parametrize("error", [ValueError("bad file"), OSError("no such file")])
def test_errors_of_the_main_process_are_raised(error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        on_main_process(fail)
    assert raised.value is error


def test_columns_of_micro_batches_are_joined_by_name():
    batches = [
        {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([3.0, 4.0])},
        {"a": torch.ones(1), "b": torch.zeros(1)},
    ]
    columns = Processes().gather_columns(batches)
    assert {name: values.tolist() for name, values in columns.items()} == {"a": [3, 4, 1], "b": [1, 2, 0]}
