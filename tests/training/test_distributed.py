"""What a process knows of the others. Two real processes: test_token_batches.py."""

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
