"""A random reward model whose chat template ends in the EOS token."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.helpers.tiny_model import write_model


def write_reward_model(folder: Path, seed: int = 0, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vocab_size": 25, "max_position_embeddings": 128, "num_labels": 1, "pad_token_id": None} | sizes | config
    LlamaForSequenceClassification(LlamaConfig(**config)).save_pretrained(folder)
    return folder
