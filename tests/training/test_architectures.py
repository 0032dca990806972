"""Shrunken twins of other instruct models: packed scoring equals the padded reference, or the model is refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rmipo.training import attention, scoring
from rmipo.training.packing import pack_pairs, split_pairs
from tests.helpers.small_models import SIZES, make_pairs
from tests.references.padded import padded_pairs, rmipo_loss

CONTEXT = [1, 2]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
GEMMA3_TEXT = SIZES | {"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3_TEXT |= {"query_pre_attn_scalar": 20}  # a scale of its own
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SERVED = {
    "gpt-2": lambda: transformers.GPT2Config(
        vocab_size=61, n_positions=256, n_embd=32, n_layer=2, n_head=4, **WITHOUT_DROPOUT
    ),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=1),
    "llama-3.2": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "qwen2.5": lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "gemma-3-1b": lambda: transformers.Gemma3TextConfig(**GEMMA3_TEXT),
    "gemma-3-4b": lambda: transformers.Gemma3Config(text_config=GEMMA3_TEXT, vision_config=VISION),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "phi-3": lambda: transformers.Phi3Config(**SIZES, pad_token_id=0, sliding_window=6),
    "olmo-2": lambda: transformers.Olmo2Config(**SIZES, pad_token_id=0),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layer_interval=2),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**SIZES, **EXPERTS),
    "qwen2-moe-window": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **EXPERTS, use_sliding_window=True, sliding_window=5
    ),
}
# name -> config, what the refusal names
REFUSED = {
    "gemma-2": (lambda: transformers.Gemma2Config(**SIZES, head_dim=8), "soft-capped attention scores"),
    "gpt-oss": (lambda: transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
                "attention sinks"),
    "mamba": (lambda: transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
              "linear_attention"),
    "llama-4": (lambda: transformers.Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=16, num_local_experts=2),
                "chunked_attention"),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
              "no pluggable attention"),
}  # fmt: skip


def make_twin(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "vision" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_packed_scores_and_gradients_equal_the_padded_reference(name):
    config = SERVED[name]()
    pairs = make_pairs(2, prompt_lengths=(1, 1)) + make_pairs(4, seed=3, prompt_lengths=(1, 60))
    reference = make_twin(config)
    expected = padded_pairs(reference, pairs, CONTEXT)
    expected_loss = rmipo_loss(expected)
    expected_loss.backward()

    model = make_twin(config)
    # transformers' GPT-2 looks into its mask, and fails on a block mask.
    for kind in ("dense", "segment") if name == "gpt-2" else ("dense", "flex", "segment"):
        scored = scoring.score_pairs(model, [pairs[:4], pairs[4:]], prior_context=CONTEXT, kind=kind)
        assert scored.keys() == expected.keys() and model.config._attn_implementation == "sdpa"
        for field, values in expected.items():
            torch.testing.assert_close(
                scored[field], values.detach().float(), atol=3e-4, rtol=0, msg=f"{kind}: {field}"
            )
        attention.attach(model, kind)
        with torch.no_grad():  # where the head is a fused one, full logits are still right
            logits = scoring.response_logits(model, packed := pack_pairs(pairs), model.config)
            logps = scoring.token_logps(model, packed, model.config)
        torch.testing.assert_close(scoring.label_logps(logits, packed.labels), logps, atol=2e-5, rtol=0)

    model.train()
    chosen, rejected = split_pairs(scoring.response_logps(model, packed, model.config))
    loss = rmipo_loss(scored | {"chosen_logps": chosen, "rejected_logps": rejected})
    loss.backward()

    assert loss.item() == pytest.approx(expected_loss.item(), abs=2e-5)
    compared = 0
    for (parameter_name, actual), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        if wanted.grad is None:
            assert actual.grad is None and ("vision" in parameter_name or "multi_modal" in parameter_name)
            continue
        scale = wanted.grad.abs().max().item()
        torch.testing.assert_close(actual.grad, wanted.grad, atol=1e-4 * max(scale, 1e-2), rtol=0, msg=parameter_name)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_packing_cannot_serve_are_refused(name):
    make_config, reason = REFUSED[name]
    model = AutoModelForCausalLM.from_config(make_config())
    with pytest.raises(attention.ArchitectureError, match=reason):
        attention.attach(model, "segment")


def test_logits_may_be_capped_and_ordinary_sequences_need_no_features():
    config = transformers.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None)
    assert config.final_logit_softcapping == 30.0
    attention.attach(AutoModelForCausalLM.from_config(config), "segment")
    attention.attach(AutoModelForCausalLM.from_config(REFUSED["llama-4"][0]()), "plain")
