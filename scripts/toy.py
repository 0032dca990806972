"""Make the tiny setting's world: data, tokenizer and an untrained model.

    .venv/bin/python scripts/toy.py --config recipes/tiny/world.yaml
    .venv/bin/python scripts/toy.py --config recipes/tiny/world.yaml --output outputs/tiny/world-mine --data my_pairs.jsonl.gz

With --data the tokenizer is trained on these pairs, and the SFT dialogues are their chosen responses.
"""

from pathlib import Path

from rmipo import cli
from rmipo.tiny.config import load_world_config


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("--config", required=True, help="the knobs, such as recipes/tiny/world.yaml")
    parser.add_argument("--output", default="outputs/tiny/world", type=Path, help="default: %(default)s")
    parser.add_argument("--data", help="preference pairs in place of the world's: a folder or file")
    options = parser.parse_args()
    config = load_world_config(options.config)

    from rmipo.data.pairs import load_pairs
    from rmipo.recipe.schema import DataConfig
    from rmipo.tiny.files import SPLITS, write_world

    pairs = None
    if options.data:
        pairs = {split: load_pairs(DataConfig(dataset_name=options.data), split) for split in SPLITS}
    print(f"world: {options.output} {'made' if write_world(options.output, config, pairs) else 'exists and is kept'}")
