"""Nothing from outside is run, no secret gets out, nobody's files are overwritten."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rmipo.evaluation.hh import score_model
from rmipo.evaluation.target import check_trained_prompts
from rmipo.generation.answers import Generator, Request, check_settings
from rmipo.generation.engines import TransformersEngine
from rmipo.plan.memory import load_config
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import LoadingError, check_limits, load_model, load_tokenizer
from tests.helpers.families import make_model, make_tokenizer, save
from tests.helpers.launched import launch
from tests.helpers.rows import pair, user
from tests.helpers.twins import changed, make_twin

SECRETS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Xw5" * 11,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "fedcba98",
    "OPENAI_API_KEY": "sk-" + "Yv3" * 16,
}


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def model_with_code(tmp_path) -> Path:
    """A model folder whose configuration, weights and tokenizer name classes of its own; loading them leaves a file."""
    folder = tmp_path / "model"
    save("llama3", folder)
    (folder / "modeling_custom.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Custom: pass\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_custom.Custom", "AutoModelForCausalLM": "modeling_custom.Custom"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "custom", "auto_map": classes}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["modeling_custom.Custom", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def answer_with(folder: Path) -> None:
    with Generator(folder, {"engine": "transformers"}) as generator:
        generator.answer([Request("q", [user("a")])], folder / "answers.jsonl")


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder))


USES = {
    "model": lambda folder: load_model(config_of(folder)),
    "tokenizer": lambda folder: load_tokenizer(config_of(folder)),
    "limits": lambda folder: check_limits(make_tokenizer("llama3"), config_of(folder), 10),
    "planning": lambda folder: load_config(str(folder)),
    "answers": answer_with,
    "engine": lambda folder: TransformersEngine(folder, check_settings({}), [1]),
    "scores": lambda folder: score_model(folder, Dataset.from_list([pair(0) | {"row": 0}])),
    "template": lambda folder: check_trained_prompts(folder, {"prompt_probe": []}),
}


@pytest.mark.parametrize("use", USES)
def test_code_of_a_model_folder_is_not_run(model_with_code, tmp_path, monkeypatch, use):
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # transformers would ask, and somebody says yes
    with pytest.raises(ValueError, match=r"can't be loaded|custom code|has no readable"):
        USES[use](model_with_code)
    assert not (tmp_path / "pwned").exists()


def pickled_model(folder: Path, extra: dict | None = None) -> str:
    make_tokenizer("llama3").save_pretrained(folder)
    model = make_model("llama3")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() | (extra or {}), folder / "pytorch_model.bin")
    return str(folder)


def test_pickled_weights_are_loaded_only_if_asked_for_by_name_and_run_nothing(tmp_path):
    folder, hostile = pickled_model(tmp_path), pickled_model(tmp_path / "model", {"x": Hostile(tmp_path / "pwned")})
    with pytest.raises(LoadingError, match="allow_pickled_weights"):
        load_model(ModelConfig(model_name_or_path=folder))
    loaded = load_model(ModelConfig(model_name_or_path=folder, dtype="float32", allow_pickled_weights=True))
    for name, value in make_model("llama3").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        load_model(ModelConfig(model_name_or_path=hostile, allow_pickled_weights=True))
    assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)  # it would have
    assert (tmp_path / "pwned").exists()


def test_no_secret_of_the_environment_gets_into_any_output(tmp_path):
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    overrides = changed(overrides, report_to="[wandb, tensorboard]", save_strategy="steps", save_steps=1)
    command = ["scripts/preference.py", "--config", "recipes/tiny/rmipo.yaml"]
    folders = {"WANDB_DIR": str(tmp_path), "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard")}
    training = launch([*command, *overrides, "--output_dir", str(tmp_path / "out")], **SECRETS, **folders)
    assert training.wait() == 0, training.output[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "data" not in path.parts]
    written = {str(path): path.read_bytes() for path in files} | {"output": training.output.encode()}
    assert any(name.endswith(".wandb") for name in written) and any("tfevents" in name for name in written)
    assert any(name.endswith("checkpoint-2/training_args.bin") for name in written)
    for name, content in written.items():
        for variable, secret in SECRETS.items():
            assert secret.encode() not in content, f"{variable} is in {name}"
