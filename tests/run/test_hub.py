"""The hub, for real: the client of huggingface_hub against a server on loopback. Models, data, gates, breaks, uploads."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.helpers.families import save
from tests.helpers.hub_server import TOKEN, Hub
from tests.helpers.paths import ROOT
from tests.helpers.twins import make_twin

SECRET = {"HF_TOKEN": TOKEN}


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def twin(hub, tmp_path):
    """Overrides of a run whose model and data are on the hub, the model by the commit that was its first."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    save("llama3", tmp_path / "model", intermediate_size=40_000)  # 31 MB: the client keeps what it has by 10 MiB
    first = hub.add("models", "org/model", tmp_path / "model")
    hub.repositories["models", "org/model"].commit({"config.json": b"{}"})  # what `main` is now can't be loaded
    hub.add("datasets", "org/pairs", tmp_path / "data")
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True))
    flags |= {"--model_name_or_path": "org/model", "--model_revision": first, "--dataset_name": "org/pairs"}
    return flags | {"--output_dir": str(tmp_path / "out"), "--max_steps": "1", "--eval_strategy": "no"}


def train(hub, tmp_path, flags, **environment):
    """A process of its own: the client reads HF_ENDPOINT when it is imported."""
    command = [sys.executable, "scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")} | hub.environment | environment
    return subprocess.run(
        [*command, *(text for pair in flags.items() for text in pair)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_hub_ids_a_pinned_revision_a_broken_download_and_an_upload(hub, twin, tmp_path):
    hub.repositories["models", "org/model"].gated = True
    hub.granted.add("org/model")
    size = (tmp_path / "model/model.safetensors").stat().st_size
    hub.breaking["model.safetensors"] = size // 2
    # DPO: the cache of reference log-probabilities is named after the revision that was loaded.
    flags = twin | {
        "--push_to_hub": "true",
        "--hub_model_id": "member/aligned",
        "--overlay": "recipes/methods/dpo.yaml",
    }
    done = train(hub, tmp_path, flags, **SECRET)
    assert done.returncode == 0, done.stderr[-4000:]
    # The download went on where it broke.
    ranges = [asked for _, path, asked in hub.requests if path.endswith("/model.safetensors") and asked]
    assert ranges and 0 < int(ranges[0].removeprefix("bytes=").rstrip("-")) < size
    # Only the pinned revision was read.
    assert not [path for _, path, _ in hub.requests if path.startswith("/org/model/resolve/main")]

    uploaded = hub.repositories["models", "member/aligned"]
    files = uploaded.commits[uploaded.names["main"]]
    out = tmp_path / "out"
    assert uploaded.private and files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == ["org/model"] and header["datasets"] == ["org/pairs"]
    assert files.keys() >= {"config.json", "tokenizer.json", "generation_config.json", "run.json"}
    assert not [path for path in files if path.startswith("checkpoint-")]
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] and record["recipe"]["model_revision"] == flags["--model_revision"]
    assert f"uploaded: {hub.environment['HF_ENDPOINT']}/member/aligned" in done.stdout


@pytest.mark.parametrize("login", [{}, SECRET], ids=["no login", "not granted"])
def test_a_gated_model_is_refused_with_the_fix(hub, twin, tmp_path, login):
    hub.repositories["models", "org/model"].gated = True
    done = train(hub, tmp_path, twin, **login)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-4000:]
    assert "org/model" in done.stderr and "hf auth login" in done.stderr
    assert not (tmp_path / "out/run.json").exists()


def test_data_that_is_not_there_is_refused_by_name(hub, twin, tmp_path):
    done = train(hub, tmp_path, twin | {"--dataset_name": "org/other"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-4000:]
    assert "org/other: the dataset can't be reached on the hub" in done.stderr
