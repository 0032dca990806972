"""The file with the running statistics of an objective."""

import json

import torch

from rmipo.training.state import load_objective_state, save_objective_state


def test_statistics_are_kept_in_float64_in_a_file_that_later_versions_read(tmp_path):
    state = {"mean": torch.tensor(1 / 3, dtype=torch.float64), "count": torch.tensor(7.0, dtype=torch.float64)}
    save_objective_state(str(tmp_path), state)
    assert json.loads((tmp_path / "objective_state.json").read_text()) == {"mean": 1 / 3, "count": 7}
    loaded = load_objective_state(tmp_path)
    assert {name: (value.dtype, value.shape, value.item()) for name, value in loaded.items()} == {
        name: (torch.float64, (), value.item()) for name, value in state.items()
    }
