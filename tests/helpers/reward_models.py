"""A random reward model whose chat template ends in the EOS token."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

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


def reward_alone(folder: Path, prompt: str, answer: str) -> float:
    """One dialogue without padding: the score at its last token, from the layers themselves."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForSequenceClassification.from_pretrained(folder)
    words = ["<s>", "<user>", *prompt.split(), "<assistant>", *answer.split(), "</s>"]
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokenizer.convert_tokens_to_ids(words)])).last_hidden_state
        return model.score(hidden[0, -1]).item()
