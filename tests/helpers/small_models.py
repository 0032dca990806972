"""Random models without a tokenizer, and pairs of random token ids for them."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_dropout": 0.0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
}


def make_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa", dtype=torch.float32
    )
    # Embeddings drawn wide, so that attention patterns are far from uniform and a wrong mask shows.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def make_pairs(count, seed=0, prompt_lengths=(1, 9)):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = torch.randint(low, high + 1, (1,), generator=generator).item()
        return torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(*prompt_lengths), "chosen_ids": tokens(1, 12), "rejected_ids": tokens(1, 12), "row": i}
        for i in range(count)
    ]
