"""Make the tiny setting's world: data, tokenizer and an untrained model.

    .venv/bin/python scripts/toy.py --config recipes/tiny/world.yaml
    .venv/bin/python scripts/toy.py --config recipes/tiny/world.yaml --output outputs/tiny/world-mine --data my_pairs.jsonl.gz

With --data the tokenizer is trained on these pairs, and the SFT dialogues are their chosen responses.
"""

import argparse
import json
from pathlib import Path

from rmipo import cli
from rmipo.tiny.config import load_world_config


def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("--config", required=True, help="the knobs, such as recipes/tiny/world.yaml")
    parser.add_argument("--output", default="outputs/tiny/world", type=Path, help="default: %(default)s")
    parser.add_argument("--data", help="preference pairs in place of the world's: a folder or file")
    make(parser.parse_args())


def make(options: argparse.Namespace) -> None:
    config = load_world_config(options.config)

    from rmipo.data.pairs import load_pairs
    from rmipo.recipe.schema import DataConfig
    from rmipo.tiny.files import SPLITS, write_world

    pairs = None
    if options.data:
        source = DataConfig(dataset_name=options.data)
        pairs = {split: load_pairs(source, split) for split in SPLITS}
    if not write_world(options.output, config, pairs):
        print(f"world: {options.output} already exists and is kept")
        return
    model = json.loads((options.output / "model" / "config.json").read_text())
    rows = {name: count_rows(options.output / f"{name}.jsonl") for name in ("sft/train", "sft/test")}
    print(
        f"world: {options.output} with {rows['sft/train']} + {rows['sft/test']} SFT dialogues (training + test) and an "
        f"untrained Llama of {model['num_hidden_layers']} layers for {model['vocab_size']} tokens"
    )


def count_rows(path: Path) -> int:
    with open(path) as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    cli.run(main)
