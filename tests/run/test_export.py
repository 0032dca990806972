"""What a run leaves: every tensor whole, the same scores in plain transformers, and a card that says what it is."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import load_pairs, tokenize_pairs
from rmipo.objectives.papers import PAPERS
from rmipo.recipe.schema import DataConfig
from rmipo.record import read_generations
from rmipo.run import export
from tests.helpers.families import LLAMA3_TEMPLATE, make_model, save
from tests.helpers.small_models import make_pairs, make_trainer
from tests.helpers.twins import make_twin, run
from tests.references.padded import padded_pairs


@pytest.fixture(scope="module", params=[None, pytest.param("zero3", marks=pytest.mark.slow)])
def exported(tmp_path_factory, request):
    """The folder of a run with evaluation, in one process or under ZeRO-3 on two; and the folder of its data."""
    folder = tmp_path_factory.mktemp("twin")
    overrides = make_twin(folder, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    run("tiny/rmipo", [*overrides, "--activation_checkpointing"], folder / "out", sharding=request.param)
    return folder / "out", folder


def test_exported_model_scores_as_the_trained_one_and_has_what_generation_needs_and_a_card(exported):
    out, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = load_pairs(DataConfig(dataset_name=str(folder / "data")), "test")
    limits = {"max_length": 128, "max_prompt_length": 64, "max_dropped_fraction": 0.0, "max_truncated_fraction": 1.0}
    pairs, _ = tokenize_pairs(rows, ChatFormat.probe(tokenizer), **limits)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        scores, initial = (padded_pairs(which.eval(), [dict(row) for row in pairs]) for which in (model, before))
    results = json.loads((out / "run.json").read_text())["results"]  # by the sharded model, packed, after training
    for side in ("chosen", "rejected"):
        assert scores[f"{side}_logps"].mean().item() == pytest.approx(results[f"eval_logps/{side}"], abs=2e-4)
    assert (initial["chosen_logps"] - scores["chosen_logps"]).abs().mean() > 0.05  # what training changed
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == "float32"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in GenerationConfig.from_pretrained(out).eos_token_id
    found = {path.name for path in out.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja", "run.json", "README.md"} <= found
    assert not {path.suffix for path in out.iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    tensors = export.saved_tensors(out)
    reference = make_model("llama3").state_dict()
    assert tensors == {name: (tuple(tensor.shape), "float32") for name, tensor in reference.items()}
    assert len(read_generations(out)) == 1
    text = (out / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "transformers", "tags": ["rmipo", "preference-optimization"]}
    record = json.loads((out / "run.json").read_text())
    assert yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0]) == record["recipe"]
    assert "RMiPO (preference optimization) of" in body and "runtime" not in body and "per_second" not in body
    assert f"| eval_loss | {record['results']['eval_loss']:.4g} |" in body and str(folder / "data") in body
    assert record["commit"] is None or record["commit"] in body
    assert PAPERS["rmipo"].citation in body and "2604.24804" in body


def test_a_whole_export_passes(tmp_path):
    """Tied heads need not be saved; tensors may be of the model's precision alone."""
    make_model("llama3", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    export.verify_export(tmp_path / "tied", AutoConfig.from_pretrained(tmp_path / "tied"))
    make_model("llama3").bfloat16().save_pretrained(tmp_path, max_shard_size="10KB")
    config = AutoConfig.from_pretrained(tmp_path)
    export.verify_export(tmp_path, config)
    (tmp_path / "checkpoint-2").mkdir()
    save_file({"other": torch.ones(1)}, tmp_path / "checkpoint-2/model.safetensors")
    export.verify_export(tmp_path, config)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.update({"model.norm.weight": torch.zeros(0)}), "1 saved .* model.norm.weight is .*(0,)"),
        (lambda t: t.pop("lm_head.weight"), "1 saved .* lm_head.weight is None"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), "model.norm.weight is .*float16"),
        (lambda t: t.update({"value_head.weight": torch.ones(2)}), "value_head.weight is "),
    ],
)
def test_broken_exports_are_refused_by_tensor(tmp_path, edit, named):
    save("llama3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(export.ExportError, match=named):
        export.verify_export(tmp_path, AutoConfig.from_pretrained(tmp_path))


def test_a_run_that_saves_other_tensors_than_its_models_ends_with_an_error(tmp_path):
    trainer = make_trainer(tmp_path, make_pairs(8))
    trainer.model.value_head = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(export.ExportError, match="value_head"):
        export.save(trainer)


def write_record(folder, recipe, **results):
    record = {
        "recipe": recipe, "results": results, "versions": {"torch": "2.13.0", "trl": "1.0"}, "world_size": 16,
        "hardware": ["A100", "A100"], "commit": "abc", "fingerprints": {"train": "f1", "model": "f2"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))


def test_card_of_published_adapters_trained_on_a_mixture(tmp_path, monkeypatch):
    sources = [{"path": "org/b", "fraction": 0.5}, {"path": "org/a"}, {"path": str(tmp_path)}]
    recipe = {"model_name_or_path": "org/base", "datasets": sources, "use_peft": True}
    write_record(tmp_path / "tiny/sft", recipe, eval_loss=1.23456, eval_a=3, note="none")
    monkeypatch.chdir(tmp_path / "tiny/sft")
    _, header, body = export.write_model_card(".").read_text().split("---\n", 2)
    expected = {"library_name": "peft", "base_model": ["org/base"], "datasets": ["org/b", "org/a"]}
    assert yaml.safe_load(header) == expected | {"tags": ["rmipo", "sft"]}
    assert "16 x A100, commit abc, with torch 2.13.0, trl 1.0." in body
    # A loss without a paper: the card is written at the end of the training, which would be lost.
    recipe = {"model_name_or_path": "org/base", "dataset_name": "org/pairs", "objective": {"name": "my-loss"}}
    write_record(tmp_path / "tiny/my-loss", recipe)
    assert "my-loss" in export.write_model_card(tmp_path / "tiny/my-loss").read_text()


@pytest.mark.parametrize("stage, form", [("rmipo", "on_policy_ultrafeedback"), ("sft", "ultrachat")])
def test_adapters_are_verified_too(tmp_path, stage, form):
    overrides = make_twin(tmp_path, f"tiny/{stage}", "llama3", form)
    template = tmp_path / "clock.jinja"
    template.write_text('{% set year = strftime_now("%Y") %}' + LLAMA3_TEMPLATE)
    overrides += ["--use_peft", "--lora_r", "4", "--chat_template", str(template)]
    run(f"tiny/{stage}", overrides, tmp_path / "out")
    assert "strftime_now" not in (tmp_path / "out/chat_template.jinja").read_text()
    tensors = export.saved_tensors(tmp_path / "out")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == ((4, 32), "float32")
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])["library_name"] == "peft"
