"""LoRA and QLoRA: training against a naive loop, dropout off in the prior pass, merging, memory on one GPU."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rmipo.evaluation.target import model_folder
from rmipo.fingerprints import model_fingerprint
from rmipo.record import read_metrics, recorded_run
from tests.helpers.families import make_tokenizer, save
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.small_models import CONTEXT, make_model, make_pairs, make_trainer, rows_per_step
from tests.helpers.twins import make_twin, run
from tests.references.padded import padded_pairs, train


def with_adapter(dropout=0.0, model=None):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model or make_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts them at zero, where the adapter does nothing
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_training_an_adapter_equals_a_naive_loop(tmp_path):
    pairs = make_pairs(21, seed=11)
    trainer = make_trainer(tmp_path, pairs, model=with_adapter())
    model = with_adapter()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    trained = [value for value in model.parameters() if value.requires_grad]
    start = [value.clone() for value in trained]
    train(model, pairs, rows_per_step(trainer), CONTEXT)
    trainer.train()

    actual = dict(trainer.model.named_parameters())
    for name, wanted in model.named_parameters():
        torch.testing.assert_close(actual[name], wanted, atol=2e-4, rtol=0, msg=name)
    for name, value in frozen.items():
        assert torch.equal(actual[name], value), name
    # Three steps of 1e-3 move a weight by about 3e-3: ten times the tolerance above.
    assert min((now - before).abs().max() for now, before in zip(trained, start, strict=True)) > 1.5e-3


def test_dropout_is_off_in_the_prior_pass_and_on_in_the_gradient_pass(tmp_path):
    pairs = make_pairs(4, seed=2)
    trainer = make_trainer(tmp_path, pairs, model=with_adapter(dropout=0.5), per_device_train_batch_size=4)
    step = next(iter(trainer.get_train_dataloader()))
    rows = [pairs[i] for i in step[0].rows]
    with torch.no_grad():
        expected = padded_pairs(with_adapter(dropout=0.5).eval(), rows, CONTEXT)
    model = trainer.model.train()
    (known,) = trainer.score_without_gradient(model, step)
    torch.testing.assert_close(known["prior_chosen_logps"], expected["prior_chosen_logps"].float(), atol=1e-4, rtol=0)

    trainer.training_step(model, step)
    (columns,) = trainer.window.columns
    assert (columns["chosen_logps"] - expected["chosen_logps"]).abs().max() > 1e-2
    assert model.training


def merge(folder, *arguments):
    return run_here("merge_adapter", str(folder), *arguments)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits


def test_merged_logits_equal_the_adapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    overrides = make_twin(tmp_path, "llama3-8b-instruct/rmipo", "llama3", "on_policy_ultrafeedback")
    overlay = ["--overlay", "recipes/adapters/lora.yaml", "--lora_r=4"]
    lines = run("llama3-8b-instruct/rmipo", [*overrides, *overlay], tmp_path / "lora")
    assert [line["step"] for line in lines] == [1, 2]

    assert merge(tmp_path / "lora").code == 0
    assert "lora-merged exists" in merge(tmp_path / "lora").err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora-merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = logits(base)
    adapter = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(merged), logits(adapter), atol=1e-5, rtol=0)
    assert (logits(adapter) - before).abs().max() > 1e-3  # two steps at 1e-3 do change the model
    saved, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("lora-merged", "model"))
    assert {name: value.shape for name, value in saved.items()} == {name: v.shape for name, v in weights.items()}
    assert (tmp_path / "lora-merged" / "chat_template.jinja").is_file()
    weights["model.layers.1.mlp.up_proj.weight"][5, 5] += 1e-3  # as a merge into this folder changes them
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    ended = merge(tmp_path / "lora", "--output", str(tmp_path / "other"))
    assert ended.code == 2 and "fingerprint" in ended.err
    assert not (tmp_path / "other").exists()
    # It is the same run, and is evaluated as that; figures of what was logged count it once.
    assert recorded_run(tmp_path / "lora-merged") == recorded_run(tmp_path / "lora")
    assert read_metrics(tmp_path / "lora") and not read_metrics(tmp_path / "lora-merged")
    assert model_folder(ROOT / "recipes" / tmp_path.name / "rmipo.yaml", tmp_path.parent, "lora-merged").is_dir()


def test_bfloat16_model_with_large_logits_is_merged(tmp_path):
    save("llama3", tmp_path / "model", hidden_size=64, intermediate_size=128)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with torch.no_grad():
        base.lm_head.weight *= 20 / logits(base).abs().max()
    base.save_pretrained(tmp_path / "model")
    adapter = with_adapter(model=base)
    folder = tmp_path / "lora"
    adapter.save_pretrained(folder)
    make_tokenizer("llama3").save_pretrained(folder)
    record = {"recipe": {"model_name_or_path": str(tmp_path / "model"), "dtype": "bfloat16"}}
    record["fingerprints"] = {"model": model_fingerprint(tmp_path / "model")}
    (folder / "run.json").write_text(json.dumps(record))

    assert merge(folder).code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora-merged")
    assert merged.dtype == torch.bfloat16 and 15 < logits(merged).abs().max() < 40
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapter = PeftModel.from_pretrained(exact, folder).merge_and_unload()
    saved = load_file(tmp_path / "lora-merged" / "model.safetensors")
    for name, value in adapter.state_dict().items():
        if name in saved:
            assert torch.equal(saved[name], value.to(torch.bfloat16)), name


def test_four_bit_base_trains_an_adapter(tmp_path):
    pytest.importorskip("bitsandbytes", reason="make install EXTRAS=gpu")
    overrides = make_twin(tmp_path, "llama3-8b-instruct/rmipo", "llama3", "on_policy_ultrafeedback")
    save("llama3", tmp_path / "model", hidden_size=64, intermediate_size=128)  # 4-bit blocks hold 64 weights
    overlay = ["--overlay", "recipes/adapters/qlora.yaml", "--lora_r=4"]
    lines = run("llama3-8b-instruct/rmipo", [*overrides, *overlay], tmp_path / "qlora")
    # One step at the same pairs: what 4 bits change of the first loss is small, and not nothing.
    plain = run("llama3-8b-instruct/rmipo", overrides, tmp_path / "plain")
    assert 0 < abs(lines[0]["loss"] - plain[0]["loss"]) < 0.05
    assert merge(tmp_path / "qlora").code == 0
