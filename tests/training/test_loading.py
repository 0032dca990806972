"""What a published checkpoint may bring along: a generation configuration that transformers refuses to save."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rmipo.generation.answers import own_settings, stop_ids
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import LoadingError, load_model, load_policy, load_tokenizer
from tests.helpers.families import save


@pytest.mark.parametrize(
    "settings, sampled, kept",
    [
        ({"temperature": 0.6, "top_p": 0.9}, True, {"temperature": 0.6, "top_p": 0.9}),
        ({"early_stopping": True, "num_beams": 1}, None, {"early_stopping": None}),
        ({"pad_token_id": -1}, None, {"pad_token_id": None}),
        ({"temperature": 0.7, "do_sample": True}, True, {"temperature": 0.7}),
    ],
)
def test_an_invalid_generation_configuration_is_repaired(tmp_path, capsys, settings, sampled, kept):
    folder = save("llama3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model = load_model(ModelConfig(model_name_or_path=folder, dtype="float32"))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.get("do_sample") == sampled and {key: saved.get(key) for key in kept} == kept
    assert saved["eos_token_id"] == json.loads(path.read_text())["eos_token_id"]
    valid = "do_sample" in settings
    assert ("notice: the generation_config.json of" in capsys.readouterr().out) is not valid


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"do_sample": ', "Expecting value: line 1"),
        ("\xff", "'utf-8' codec can't decode"),
        ("[]", "it holds [], expected an object with keys"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        ('{"eos_token_id": [1, "</s>"]}', "eos_token_id is [1, '</s>']"),
        ('{"pad_token_id": true}', "pad_token_id is True"),
        ('{"temperature": "hot"}', "temperature is 'hot'"),
        ('{"do_sample": "yes"}', "do_sample is 'yes'"),
        ('{"early_stopping": "x"}', "`early_stopping` must be a boolean"),
        ('{"compile_config": 3}', "You provided `compile_config` as an instance of <class 'int'>"),
        ('{"watermarking_config": 3}', "'int' object has no attribute 'validate'"),
        ('{"watermarking_config": {"strength": 1}}', "unexpected keyword argument 'strength'"),
    ],
)
def test_a_generation_configuration_that_cannot_be_read_is_named(tmp_path, text, reason):
    folder = save("llama3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_bytes(text.encode("latin-1"))
    for read in (
        lambda: load_tokenizer(ModelConfig(model_name_or_path=folder)),
        lambda: own_settings(folder),
        lambda: stop_ids(path.parent, None, None),
    ):
        with pytest.raises(LoadingError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"model_name_or_path: {path} can't be used (") and reason in message
        assert message.endswith("Correct the file, or remove it") and "network" not in message
    path.unlink()
    load_tokenizer(ModelConfig(model_name_or_path=folder))


def test_a_policy_has_no_dropout(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config, ids = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32"), torch.arange(8)[None]
    policy, model = load_policy(config), load_model(config)
    assert torch.equal(policy.train()(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
