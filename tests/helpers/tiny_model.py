"""A random model small enough to load in every test, a reward model like it, and files of short answers."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rmipo.generation.answers import Generator, Request


def write_model(folder, seed: int = 0):
    """A random Llama of a few thousand weights with a word-level tokenizer and a chat template. Returns the folder."""
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
    return folder


def naive_scores(model_dir, pairs: list[dict], release: bool = False) -> dict[str, torch.Tensor]:
    """Sums and lengths, one unpacked sequence at a time; the ids are spelt out, not taken from the library.

    `release`: as the authors' code, the header is part of the response and log pi(y) has no context but the header.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    columns: dict[str, list[float]] = {}

    def logp(context: list[str], response: list[str]) -> float:
        prompt, scored = tokenizer.convert_tokens_to_ids(context), tokenizer.convert_tokens_to_ids(response)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + scored])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(scored)), scored].double().sum().item()

    for pair in pairs:
        for side in ("chosen", "rejected"):
            question, answer = ["<s>", "<user>", *pair["prompt"].split()], [*pair[side].split(), "</s>"]
            if release:
                values = logp(question, ["<assistant>", *answer]), logp(["<assistant>"], answer), 1 + len(answer)
            else:
                values = logp([*question, "<assistant>"], answer), logp(["<s>", "<assistant>"], answer), len(answer)
            names = (f"{side}_logps", f"prior_{side}_logps", f"{side}_lengths")
            for name, value in zip(names, values, strict=True):
                columns.setdefault(name, []).append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


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


SETTINGS = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 12, "batch_size": 4, "temperature": 1.0}


def requests(count: int) -> list[Request]:
    words = [" ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 5)) for i in range(count)]
    return [Request(f"q{i}", [{"role": "user", "content": text}]) for i, text in enumerate(words)]


def generate(model_dir, requests: list[Request], path, settings: dict) -> list[str]:
    with Generator(model_dir, settings) as generator:
        return generator.answer(requests, path)


def other_versions(path, engine: str) -> dict[str, str]:
    """Make an answers file one that another machine wrote; returns the versions that it had."""
    header, *answers = path.read_text().splitlines()
    versions = {engine: "0.30.0", "torch": "2.13.0+cu130", "transformers": "5.10.4"}
    header = json.loads(header)
    header["versions"], header["decoding"]["engine"] = versions, engine
    path.write_text("\n".join([json.dumps(header), *answers]) + "\n")
    return versions
