"""What is compared between tokenizer, model and recipe before the model is loaded."""

import json

import pytest
from transformers import Gemma3Config, GPT2Config, LlamaConfig, MambaConfig

from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import LoadingError, check_limits, load_tokenizer, positions_of
from tests.helpers.families import LLAMA3_TEMPLATE, make_tokenizer, save

ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save("llama3", folder)
    return folder


def limits(folder, max_length=10, tokenizer=None, **changes):
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        check_limits(tokenizer or make_tokenizer("llama3"), ModelConfig(model_name_or_path=str(folder)), max_length)
    finally:
        path.write_text(before)


def test_added_tokens_need_embeddings(model):
    tokenizer = make_tokenizer("llama3")
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    limits(model, tokenizer=tokenizer)
    limits(model, tokenizer=tokenizer, vocab_size=len(tokenizer))
    added = [f"<|mine-{number}|>" for number in range(vocabulary - len(tokenizer) + 2)]
    tokenizer.add_tokens(added)
    with pytest.raises(LoadingError, match=rf"2 tokens more .* \({vocabulary}\), such as {', '.join(added[-2:])}\."):
        limits(model, tokenizer=tokenizer)
    with pytest.raises(LoadingError, match=r"\d+ tokens more .* \(3\), such as [^,]+, [^,]+, [^,]+\. Remove"):
        limits(model, tokenizer=make_tokenizer("llama3"), vocab_size=3)


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
    if positions is None:
        config.rope_parameters = ROPE
        assert positions_of(config) is None
    config.rope_parameters = {"rope_type": "default", "factor": None}
    assert positions_of(config) == getattr(config, "max_position_embeddings", None)
    config.rope_parameters = None
    assert positions_of(config) == getattr(config, "max_position_embeddings", None)


def test_the_default_of_several_templates_is_taken(tmp_path):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = {"default": LLAMA3_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "several")
    config = ModelConfig(model_name_or_path=str(tmp_path / "several"))
    assert load_tokenizer(config).chat_template == LLAMA3_TEMPLATE
    assert load_tokenizer(config, "{{ mine }}").chat_template == "{{ mine }}"
    tokenizer.chat_template = {"chat": LLAMA3_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "none")
    config = ModelConfig(model_name_or_path=str(tmp_path / "none"))
    with pytest.raises(LoadingError, match="no default specified"):
        load_tokenizer(config)
    for template in (LLAMA3_TEMPLATE, ""):
        assert load_tokenizer(config, template).chat_template == template


def test_an_adapter_is_no_model_to_start_from(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadingError, match=rf"{tmp_path} holds an adapter\. .*scripts/merge_adapter\.py {tmp_path}$"):
        check_limits(make_tokenizer("llama3"), ModelConfig(model_name_or_path=str(tmp_path)), 10)
