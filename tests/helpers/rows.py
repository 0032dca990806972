"""Rows of preference pairs, and files of them, for the tests of data."""

import gzip
import json

from datasets import Dataset

from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import tokenize_pairs
from rmipo.recipe.schema import DataConfig
from tests.helpers.families import make_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(i, prompt=None, chosen=None, rejected=None):
    return {
        "prompt": [user(f"Question {i}")] if prompt is None else prompt,
        "chosen": [assistant(f"Right {i}")] if chosen is None else chosen,
        "rejected": [assistant(f"Wrong {i}")] if rejected is None else rejected,
    }


def pairs(*numbers):
    return [pair(i) for i in numbers]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(text)
    return path


def config(path, **values):
    return DataConfig(dataset_name=str(path), **values)


def tokenize(rows, tokenizer="llama3", **limits):
    """With a tokenizer, or that of a family."""
    dataset = Dataset.from_list([{"row": i, **row} for i, row in enumerate(rows)])
    defaults = {"max_length": 200, "max_prompt_length": 100, "max_dropped_fraction": 1.0, "max_truncated_fraction": 1.0}
    tokenizer = make_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return tokenize_pairs(dataset, ChatFormat.probe(tokenizer), **(defaults | limits))


def questions(dataset):
    return [int(prompt[0]["content"].split()[1]) for prompt in dataset["prompt"]]
