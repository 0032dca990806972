"""Small local stand-ins for the model families of the recipes.

Tokenizers have the family's special tokens, kind of BPE and shape of chat template; models are of the same architecture
class. Nothing is downloaded, everything is deterministic.
"""

import functools
import json
import string
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Could you explain how a sliding window works, and why it saves memory?",
    "Of course! Each token attends to the last few tokens only, so that the cost grows with the window.",
    "I am not sure what you mean. Please tell me more about it, and I will do my best to help you.",
    "Here are three ideas:\n1. Read the question.\n2. Think about the answer.\n3. Write it down.\n\nGood luck!",
    "def add(a, b):\n    return a + b\n",
    string.printable,
]

LLAMA3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3_TEMPLATE = (  # the last answer carries an empty block of reasoning, as Qwen3's template writes it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Family(NamedTuple):
    special: list[str]
    roles: dict[str, str]  # of special tokens in the tokenizer
    prefix_space: str | None  # SentencePiece's; "always": in front of every stretch of text between special tokens
    template: str
    config: type
    options: dict


LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
MISTRAL_TOKENS = ["<unk>", "<s>", "</s>"]
MISTRAL_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
QWEN3_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_ROLES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
LLAMA3 = Family(LLAMA3_TOKENS, LLAMA3_ROLES, None, LLAMA3_TEMPLATE, LlamaConfig, {"rope_theta": 500000.0})
MISTRAL = Family(MISTRAL_TOKENS, MISTRAL_ROLES, "always", MISTRAL_TEMPLATE, MistralConfig, {"sliding_window": 32})
GEMMA = Family(GEMMA_TOKENS, GEMMA_ROLES, "never", GEMMA_TEMPLATE, GemmaConfig, {"head_dim": 8})
GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama3": LLAMA3,
    "llama-3.2": LLAMA3._replace(options={"rope_theta": 500000.0, "tie_word_embeddings": True}),
    "mistral-instruct": MISTRAL,
    "zephyr": MISTRAL._replace(roles=MISTRAL_ROLES | {"pad_token": "</s>"}, template=ZEPHYR_TEMPLATE),
    "qwen3": Family(QWEN3_TOKENS, QWEN3_ROLES, None, QWEN3_TEMPLATE, Qwen3Config, {"head_dim": 8}),
    "gemma": GEMMA,
    "gemma-3": GEMMA._replace(config=Gemma3TextConfig, options=GEMMA3),
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def make_tokenizer(family: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of `family`, a key of FAMILIES, with its own chat template unless one is given."""
    traits = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(family)), **traits.roles)
    tokenizer.chat_template = chat_template or traits.template
    return tokenizer


def make_model(family: str, seed: int = 0, **sizes) -> PreTrainedModel:
    """A randomly initialised float32 model of the family's architecture, for the tokenizer of `make_tokenizer`."""
    tokenizer = make_tokenizer(family)
    tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    options = SIZES | {"vocab_size": len(tokenizer)} | tokens | FAMILIES[family].options | sizes
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family].config(**options), dtype=torch.float32)


def save(family: str, folder, **sizes) -> str:
    make_tokenizer(family).save_pretrained(folder)
    make_model(family, **sizes).save_pretrained(folder)
    return str(folder)


@functools.cache
def _trained(family: str) -> str:
    traits = FAMILIES[family]
    build = _byte_level if traits.prefix_space is None else _sentencepiece
    tokenizer = build(traits.special, traits.prefix_space)
    # <think> is one token of Qwen3 but not a special one.
    tokenizer.add_tokens(["<think>", "</think>"] if family == "qwen3" else [])
    if bos := traits.roles.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def _byte_level(special: list[str], _prefix_space: None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(special: list[str], prefix_space: str) -> Tokenizer:
    """BPE over text whose spaces are written as U+2581; characters it has not seen become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix_space, split=True)
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(trained["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    prepend = [normalizers.Prepend("\u2581")] if prefix_space == "always" else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space == "always" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
