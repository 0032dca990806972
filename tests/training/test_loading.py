"""What a published checkpoint may bring along, and what is compared between tokenizer, model and recipe before it is loaded."""

import importlib.util
import json
import logging
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    Trainer,
    TrainingArguments,
)

from rmipo.errors import UserError
from rmipo.generation.answers import own_settings, stop_ids
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import LoadingError, check_limits, load_model, load_tokenizer, positions_of
from rmipo.training.parts import policy
from tests.helpers.families import LLAMA3_TEMPLATE, make_model, make_tokenizer, save


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
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens | settings))
    model = load_model(ModelConfig(model_name_or_path=folder, dtype="float32"))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.get("do_sample") == sampled and {key: saved.get(key) for key in kept} == kept
    given = json.loads(path.read_text())
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert saved.get(token) == (None if given[token] == -1 else given[token])
    valid = "do_sample" in settings
    said = capsys.readouterr().out
    repair = "do_sample: true is added" if "temperature" in settings else "only its special tokens are kept"
    assert "notice" not in said if valid else re.search(rf"notice: .* {folder} is not valid .*: {repair}", said)


@pytest.mark.parametrize("content", ["not JSON", '{"model_type": "of another library"}'])
@pytest.mark.parametrize("what", ["tokenizer", "configuration", "model"])
def test_what_cannot_be_loaded_is_named_with_the_reason(tmp_path, what, content):
    def use(name):
        config = ModelConfig(model_name_or_path=str(name))
        if what == "tokenizer":
            load_tokenizer(config)
        elif what == "model":
            load_model(config)
        else:
            check_limits(make_tokenizer("llama3"), config, 10)

    expected = rf"^model_name_or_path: the {what} of {{}} can't be loaded \({{}}[^\s()][^\n]+\)\. Check"
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadingError, match=expected.format(tmp_path, "")) as error:
        use(tmp_path)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    with pytest.raises(LoadingError, match=expected.format("nobody/nothing", "We couldn't ")):
        use("nobody/nothing")


def test_weights_are_quantized_where_the_recipe_says_so(tmp_path):
    config = ModelConfig(model_name_or_path=save("llama3", tmp_path), load_in_4bit=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="bitsandbytes"):
            load_model(config)
    else:
        assert load_model(config).is_loaded_in_4bit


def test_the_revision_is_that_of_all_parts(tmp_path, monkeypatch):
    """From the hub's cache, which holds two revisions of one model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--own--model"
    for revision, seed, positions in (("main", 0, 64), ("v2", 1, 32)):
        folder = repository / "snapshots" / revision
        make_model("llama3", seed, max_position_embeddings=positions).save_pretrained(folder)
        make_tokenizer("llama3", revision).save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(revision)
    for revision, seed, positions in (("main", 0, 64), ("v2", 1, 32)):
        config = ModelConfig(model_name_or_path="own/model", model_revision=revision, dtype="float32")
        assert load_tokenizer(config).chat_template == revision
        check_limits(make_tokenizer("llama3"), config, positions)
        with pytest.raises(LoadingError, match=f"it has {positions} positions"):
            check_limits(make_tokenizer("llama3"), config, positions + 1)
        model = load_model(config)
        assert torch.equal(model.lm_head.weight, make_model("llama3", seed).lm_head.weight)


def test_a_model_has_the_type_and_the_options_that_are_asked_for(tmp_path):
    folder = save("llama3", tmp_path)
    for dtype in ("bfloat16", "float32"):
        model = load_model(ModelConfig(model_name_or_path=folder, dtype=dtype), use_cache=False)
        assert model.dtype == getattr(torch, dtype) and model.config.use_cache is False
    assert load_model(ModelConfig(model_name_or_path=folder)).config.use_cache is True


def test_a_generation_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": ')
    for read in (own_settings, lambda folder: stop_ids(folder, None, None)):
        with pytest.raises(LoadingError, match=r"generation_config\.json"):
            read(tmp_path)


def test_a_policy_has_no_dropout(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config, ids = ModelConfig(model_name_or_path=str(tmp_path), dtype="float32"), torch.arange(8)[None]
    trained, model = policy(config), load_model(config)
    assert torch.equal(trained.train()(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("family", ["llama-3.2", "llama3"])  # tied and untied
def test_a_resume_calls_no_tied_weight_missing(tmp_path, caplog, monkeypatch, family):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = ModelConfig(model_name_or_path=save(family, tmp_path / "model"), dtype="float32")
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_steps": 1, "disable_tqdm": True}
    weights = []
    for folder, steps, resume in (("whole", 2, None), ("part", 1, None), ("part", 2, True)):
        args = TrainingArguments(str(tmp_path / folder), max_steps=steps, lr_scheduler_type="constant", **options)
        trainer = Trainer(load_model(source), args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert "missing keys" not in caplog.text


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}


def test_added_tokens_need_embeddings(tmp_path):
    save("llama3", tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), make_tokenizer("llama3")
    vocabulary = config.vocab_size

    def limits(size, tokenizer):
        config.vocab_size = size
        config.save_pretrained(tmp_path)
        check_limits(tokenizer, ModelConfig(model_name_or_path=str(tmp_path)), 10)

    limits(vocabulary, tokenizer)
    limits(len(tokenizer), tokenizer)
    with pytest.raises(LoadingError, match=r"\d+ tokens more .* \(3\), such as [^,]+, [^,]+, [^,]+\. Remove"):
        limits(3, tokenizer)
    added = [f"<|mine-{number}|>" for number in range(vocabulary - len(tokenizer) + 2)]
    tokenizer.add_tokens(added)
    with pytest.raises(LoadingError, match=rf"2 tokens more .* \({vocabulary}\), such as {', '.join(added[-2:])}\."):
        limits(vocabulary, tokenizer)
    (tmp_path / "adapter").mkdir()  # an adapter is no model to start from
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(LoadingError, match=r"adapter holds an adapter\. .*scripts/merge_adapter\.py .*adapter$"):
        check_limits(tokenizer, ModelConfig(model_name_or_path=f"{tmp_path}/adapter"), 10)


def test_the_limits_of_a_multimodal_model_are_those_of_its_text(tmp_path):
    tokenizer = make_tokenizer("llama3")
    text = {"vocab_size": len(tokenizer) - 1, "max_position_embeddings": 64}
    Gemma3Config(text_config=text, vision_config={}).save_pretrained(tmp_path)
    with pytest.raises(LoadingError) as error:
        check_limits(tokenizer, ModelConfig(model_name_or_path=str(tmp_path)), 65, of="the longest dialogue")
    first, *problems = str(error.value).split("\n")
    assert first == f"model_name_or_path: {tmp_path}" and len(problems) == 2
    assert problems[0].startswith("- its tokenizer has 1 tokens more")
    assert problems[1].startswith("- the longest dialogue is 65, and it has 64 positions")


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (MambaConfig(), None),
        (GPT2Config(n_positions=48), 48),
        (LlamaConfig(max_position_embeddings=64), 64),
        # Llama 3.1: trained on more than the scaling of its first stage, 8 times 32, asks for
        (LlamaConfig(max_position_embeddings=512, rope_parameters=ROPE), 512),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=ROPE), 256),
    ],
)
def test_positions_that_a_model_is_made_for(config, positions):
    assert positions_of(config) == positions
    for parameters in ({"rope_type": "default", "factor": None}, None, *([ROPE] if positions is None else [])):
        config.rope_parameters = parameters
        assert positions_of(config) == getattr(config, "max_position_embeddings", None)


def test_the_default_of_several_templates_is_taken(tmp_path):
    tokenizer = make_tokenizer("llama3")
    for name in ("default", "chat"):
        tokenizer.chat_template = {name: LLAMA3_TEMPLATE, "tool_use": "{{ tools }}"}
        tokenizer.save_pretrained(tmp_path / name)
    several, none = (ModelConfig(model_name_or_path=str(tmp_path / name)) for name in ("default", "chat"))
    assert load_tokenizer(several).chat_template == LLAMA3_TEMPLATE
    assert load_tokenizer(several, "{{ mine }}").chat_template == "{{ mine }}"
    with pytest.raises(LoadingError, match="no default specified"):
        load_tokenizer(none)
    for template in (LLAMA3_TEMPLATE, ""):
        assert load_tokenizer(none, template).chat_template == template
