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
from rmipo.fingerprints import code_fingerprint
from rmipo.tiny.config import WorldConfig
from rmipo.tiny.world import World

RECORD = "world.json"  # written last: a folder without it is incomplete
SPLITS = ("train", "test")
BOS, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
# Only special tokens stand between texts, so that no token spans the end of a prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_world(folder: Path, config: WorldConfig) -> bool:
    """Write data, tokenizer and untrained model; a world that other code made is made again.

    Returns:
        False if this very world was there already and has been kept.

    Raises:
        ConfigError: the folder holds another world.
    """
    record = {"config": asdict(config), "code": todays_code()}  # the same knobs under other code draw other facts
    if (folder / RECORD).exists():
        found = json.loads((folder / RECORD).read_text())
        if found == record:
            return False
        # Runs may have started from it: another world is never written over it.
        if differing := [key for key, value in record["config"].items() if found["config"].get(key) != value]:
            raise ConfigError(
                f"{folder} holds another world. Remove it, with the runs that started from it, or name another --output. "
                f"Different: {', '.join(differing)}"
            )
        print(f"world: {folder} was made by other code than today's and is made again")
        (folder / RECORD).unlink()
    world = World(config)
    dialogues = {split: list(world.dialogues(split)) for split in SPLITS}
    for split in SPLITS:
        write_lines(folder / "pairs" / f"{split}.jsonl", world.pairs(split))
        write_lines(folder / "sft" / f"{split}.jsonl", dialogues[split])
    write_lines(
        folder / "questions.jsonl",
        ({"prompt": question.prompt, "right": question.fact.answers} for question in world.held_out_questions),
    )
    # On what SFT trains, so that its words are few tokens.
    texts = [message["content"] for row in dialogues["train"] for message in row["messages"]]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    # The model is written as any checkpoint is: the recipes load it like one from the hub.
    make_model(config, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return True


def read_world(folder: Path) -> World:
    """The world that a folder holds.

    Raises:
        ConfigError: there is no complete world in the folder, or one that other code made.
    """
    if not (folder / RECORD).exists():
        raise ConfigError(f"{folder}: no {RECORD}, so no complete world is there. Make it with scripts/toy.py.")
    record = json.loads((folder / RECORD).read_text())
    if record.get("code") != todays_code():
        raise ConfigError(
            f"{folder}: this world was made by other code than today's. Make it again with scripts/toy.py, as make train "
            "does; runs that started from another world are then refused"
        )
    return World(WorldConfig(**record["config"]))


def todays_code() -> str:
    return code_fingerprint(Path(__file__).parent, libraries=())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens, special tokens included; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    headers = [f"<|{role}|>" for role in ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *headers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=headers,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(config: WorldConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, drawn from the world's seed; the global random state is left as it was."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=config.hidden_size**-0.5,  # with the usual 0.02 so narrow a model learns to recall late
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(llama)
    return model
