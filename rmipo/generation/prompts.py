"""The prompts that a model answers: those of a hub id, folder or file that are usable, each under a hash of its content.

And the files in which answers to them, and scores of those, are kept.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rmipo.data.chat import ChatFormat, DataError, Messages
from rmipo.data.formats import read_prompt, read_row, unusable_prompt
from rmipo.data.sources import load_source
from rmipo.errors import EvaluationError
from rmipo.files import read_lines, write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.recipe.schema import DataConfig, ModelConfig
from rmipo.training.loading import load_tokenizer


def kept_lines(path: Path, header: dict) -> list[dict]:
    """The rows of a JSONL file below its header, which says what they were made with; a new file gets it.

    Raises EvaluationError for another header: rows of another model or of other settings would be taken for these.
    """
    found, *rows = read_lines(path) or [None]
    if found is None:
        write_lines(path, [header])
    elif found != json.loads(json.dumps(header)):
        raise EvaluationError(f"{path} holds what was made otherwise: {found}, now {header}. Move or delete it")
    return rows


@dataclass(frozen=True)
class Prompt:
    """A prompt with the other columns of its row, and answers to it by key."""

    key: str  # a hash of the messages
    messages: Messages
    answers: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompts(
    name: str, split: str, model_dir: Path, dropped: Counter, *, skip: int = 0, limit: int | None = None
) -> list[Prompt]:
    """`limit` usable prompts after the first `skip`, the shortest first, so that those answered together are alike.

    Counts in `dropped` those that repeat an earlier one, are malformed, or leave no room in the model's window.
    """
    rows, _ = load_source({"path": name}, "train", DataConfig(dataset_name=name, dataset_train_split=split))
    chat = ChatFormat.probe(load_tokenizer(ModelConfig(model_name_or_path=str(model_dir))))
    window = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).max_position_embeddings
    prompts: dict[str, tuple[int, Prompt]] = {}  # with its tokens
    for row in rows:
        # Early: a hub dataset may have millions of rows.
        if limit is not None and len(prompts) == skip + limit:
            break
        try:
            (messages,) = read_row(row, read_prompt)
        except DataError as error:
            dropped[f"malformed: {error}"] += 1
            continue
        key = json_fingerprint(messages)
        if key in prompts:
            dropped["repeats an earlier prompt"] += 1
        elif reason := unusable_prompt(messages):
            dropped[reason] += 1
        elif (tokens := len(chat.prompt_ids(messages))) >= window:  # room for one token of an answer at least
            dropped[f"longer than {window - 1} tokens"] += 1
        else:
            prompts[key] = tokens, Prompt(key, messages, columns=row)
    taken = sorted(list(prompts.values())[skip:], key=lambda each: (each[0], each[1].key))
    return [prompt for _, prompt in taken]
