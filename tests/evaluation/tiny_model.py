"""A random model small enough to load in every test."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder, seed: int = 0) -> None:
    """A random Llama of a few thousand weights with a word-level tokenizer and a chat template."""
    words = ["<s>", "</s>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.pad_token = "</s>"
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <assistant> {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
