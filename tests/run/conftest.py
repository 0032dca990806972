"""The run that the tests of resuming, full disks and FSDP2 compare with."""

import functools

import pytest

from tests.helpers.twins import changed, finish, make_twin


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Overrides for a run of 15 steps over 3 epochs: 35 pairs, which the global batch of 8 doesn't divide."""
    folder = tmp_path_factory.mktemp("twin")
    overrides = make_twin(folder, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    return changed(
        overrides, max_steps=-1, num_train_epochs=3, global_batch_size=8, per_device_train_batch_size=2,
        max_train_samples=35, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=2,
        lr_scheduler_type="cosine", logging_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def whole(twin, tmp_path_factory):
    """`whole(processes)`: the folder of the undisturbed run."""

    @functools.cache
    def undisturbed(processes):
        folder = tmp_path_factory.mktemp("whole") / "run"
        finish(twin, folder, processes)
        return folder

    return undisturbed
