"""The file with the running statistics of an objective."""

import json
import shutil

import pytest
import torch

from rmipo.errors import CheckpointError
from rmipo.training.checkpoints import OBJECTIVE_STATE, complete_checkpoints, load_objective_state, save_objective_state


def test_statistics_are_kept_in_float64_in_a_file_that_later_versions_read(tmp_path):
    state = {"mean": torch.tensor(1 / 3, dtype=torch.float64), "count": torch.tensor(7.0, dtype=torch.float64)}
    run = {"pairs": "12, fingerprint a", "seed": 3}
    save_objective_state(str(tmp_path), state, run)
    written = json.loads((tmp_path / "objective_state.json").read_text())
    assert written == {"state": {"mean": 1 / 3, "count": 7}, "run": run, "files": []}
    loaded = load_objective_state(tmp_path, run)
    assert {name: (value.dtype, value.shape, value.item()) for name, value in loaded.items()} == {
        name: (torch.float64, (), value.item()) for name, value in state.items()
    }


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    save_objective_state(tmp_path, {}, {"pairs": "12, fingerprint a", "seed": 3})
    with pytest.raises(CheckpointError, match="pairs: 12, fingerprint a, now 12, fingerprint b"):
        load_objective_state(tmp_path, {"pairs": "12, fingerprint b", "seed": 3})


def test_a_checkpoint_that_has_lost_a_file_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").touch()
    save_objective_state(folder, {}, {})
    shutil.copytree(folder, tmp_path / "checkpoint-03")  # a user's copy
    assert complete_checkpoints(tmp_path, OBJECTIVE_STATE) == [folder]
    (folder / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        complete_checkpoints(tmp_path, OBJECTIVE_STATE)
