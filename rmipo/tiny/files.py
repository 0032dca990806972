"""The folder of a world: its data in JSONL, the untrained tokenizer and model, and `world.json`, which describes it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rmipo.errors import ConfigError
from rmipo.files import write_lines
from rmipo.tiny.world import World, WorldConfig

RECORD = "world.json"  # written last: a folder without it is incomplete
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
HEADERS = ["<|system|>", "<|user|>", "<|assistant|>"]
# Only special tokens stand between texts, so that no token spans the end of a prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_world(folder: Path, config: WorldConfig) -> bool:
    """Write data, tokenizer and untrained model; False if this very world was there already and has been kept.

    Raises ConfigError: the folder holds another world, from which runs may have started.
    """
    record = {"config": asdict(config)}
    if (folder / RECORD).exists():
        if asdict(read_world(folder).config) == record["config"]:
            return False
        raise ConfigError(
            f"{folder} holds another world. Remove it, with the runs that started from it, or name another"
        )
    world = World(config)
    dialogues = list(world.dialogues("train"))
    write_lines(folder / "sft/train.jsonl", dialogues)
    write_lines(folder / "sft/test.jsonl", world.dialogues("test"))
    for split in ("train", "test"):
        write_lines(folder / "pairs" / f"{split}.jsonl", world.pairs(split))
    questions = ({"prompt": question.prompt, "right": question.fact.answers} for question in world.held_out_questions)
    write_lines(folder / "questions.jsonl", questions)
    # On what SFT trains, so that its words are few tokens.
    texts = [message["content"] for row in dialogues for message in row["messages"]]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    # The model is written as any checkpoint is: the recipes load it like one from the hub.
    make_model(config, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return True


def read_world(folder: Path) -> World:
    """The world that a folder holds. Raises ConfigError if there is no complete one."""
    if not (folder / RECORD).exists():
        raise ConfigError(f"{folder}: no {RECORD}, so no complete world is there. Make it with scripts/toy.py.")
    return World(WorldConfig(**json.loads((folder / RECORD).read_text())["config"]))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens, special tokens included; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *HEADERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=HEADERS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(config: WorldConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, drawn from the world's seed; the global random state is left as it was."""
    sizes = {key: value for key, value in vars(config).items() if key in SIZES}
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=config.hidden_size**-0.5,  # with the usual 0.02 so narrow a model learns to recall late
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(llama)
