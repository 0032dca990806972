"""The hub, for real: the client of huggingface_hub against a server on loopback. Models, data, gates, uploads."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.helpers.hub_server import TOKEN, Hub
from tests.helpers.paths import ROOT
from tests.helpers.programs import Ended
from tests.helpers.twins import make_twin

pytestmark = pytest.mark.slow

SECRET = {"HF_TOKEN": TOKEN}
COMMAND = ["--config", "recipes/tiny/rmipo.yaml"]


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def twin(hub, tmp_path):
    """Overrides of a run whose model and data are on the hub, the model by the commit that was its first."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    first = hub.add("models", "org/model", tmp_path / "model")
    hub.repositories["models", "org/model"].commit({"config.json": b"{}"})  # what `main` is now can't be loaded
    hub.add("datasets", "org/pairs", tmp_path / "data")
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True))
    flags |= {"--model_name_or_path": "org/model", "--model_revision": first, "--dataset_name": "org/pairs"}
    return flags | {"--output_dir": str(tmp_path / "out"), "--max_steps": "1", "--eval_strategy": "no"}


def words(flags):
    return [text for pair in flags.items() for text in pair]


def run(hub, tmp_path, *command, input=None, login=SECRET):
    """In a process of its own: the client reads HF_ENDPOINT when it is imported."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")} | hub.environment | login
    command = [sys.executable, *command]
    done = subprocess.run(command, input=input, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_hub_ids_a_pinned_revision_and_an_upload(hub, twin, tmp_path):
    hub.repositories["models", "org/model"].gated = True
    hub.granted.add("org/model")
    # DPO: the cache of reference log-probabilities is named after the revision that was loaded.
    flags = twin | {"--push_to_hub": "true", "--hub_model_id": "member/aligned"}
    flags |= {"--overlay": "recipes/methods/dpo.yaml", "--save_strategy": "steps", "--save_steps": "1"}
    done = run(hub, tmp_path, "scripts/preference.py", *COMMAND, *words(flags))
    # Only the pinned revision was read, not `main` by its name or by its commit.
    read = {path.split("/")[4] for path in hub.requests if path.startswith("/org/model/resolve/")}
    assert read == {flags["--model_revision"]}

    uploaded = hub.repositories["models", "member/aligned"]
    files = uploaded.commits[uploaded.names["main"]]
    out = tmp_path / "out"
    assert len(uploaded.commits) == 2  # as it was made, and all at once when the run had finished
    assert uploaded.private and files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert json.loads(files["run.json"])["finished"]  # else an evaluation of the download is refused
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == ["org/model"] and header["datasets"] == ["org/pairs"]
    assert files.keys() >= {"config.json", "tokenizer.json", "generation_config.json", "run.json"}
    assert (out / "checkpoint-1").is_dir()
    assert not [path for path in files if path.startswith(("checkpoint-", "run.lock"))]
    assert json.loads(files["run.json"])["recipe"]["model_revision"] == flags["--model_revision"]
    assert f"uploaded: {hub.environment['HF_ENDPOINT']}/member/aligned" in done.stdout


REFUSED = """
import json, sys
from tests.helpers.programs import run_here
json.dump([run_here("preference", *arguments, env=env) for arguments, env in json.load(sys.stdin)], sys.stdout)
"""


def test_what_the_hub_does_not_give_is_refused_with_the_fix(hub, twin, tmp_path):
    """A gated model without a login and without a grant, and data that isn't there; in one process."""
    hub.add("models", "org/open", tmp_path / "model")
    hub.repositories["models", "org/model"].gated = True
    no_data = twin | {"--model_name_or_path": "org/open", "--model_revision": "main", "--dataset_name": "org/other"}
    cases = [(COMMAND + words(flags), login) for flags, login in ((twin, {}), (twin, SECRET), (no_data, {}))]
    done = run(hub, tmp_path, "-c", REFUSED, input=json.dumps(cases), login={})
    no_login, no_grant, not_there = (Ended(*result) for result in json.loads(done.stdout))
    for ended in (no_login, no_grant, not_there):
        assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert all("org/model" in ended.err and "hf auth login" in ended.err for ended in (no_login, no_grant))
    assert "org/other" in not_there.err
    assert not (tmp_path / "out/run.json").exists()


FRONT_DOOR = """
import sys
from datasets import load_dataset
from rmipo import RMiPOConfig, RMiPOTrainer
args = RMiPOConfig(sys.argv[1], max_length=128, max_prompt_length=64, max_steps=1, hub_model_id="member/front-door")
trainer = RMiPOTrainer("org/model", args, train_dataset=load_dataset("org/pairs", split="train"))
trainer.train()
trainer.push_to_hub(dataset_name="org/pairs")
"""


def test_a_trainer_loads_from_the_hub_and_uploads_with_its_card(hub, twin, tmp_path):
    hub.repositories["models", "org/model"].commit({"config.json": (tmp_path / "model/config.json").read_bytes()})
    run(hub, tmp_path, "-c", FRONT_DOOR, str(tmp_path / "out"))
    uploaded = hub.repositories["models", "member/front-door"]
    files = uploaded.commits[uploaded.names["main"]]
    assert files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "org/model" and header["datasets"] == "org/pairs" and "rmipo" in header["tags"]
    assert "2604.24804" in card and not [path for path in files if path.startswith("checkpoint-")]
