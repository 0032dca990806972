"""Make the tiny setting's world: data, tokenizer and an untrained model.

.venv/bin/python scripts/toy.py --config recipes/tiny/world.yaml
"""

from pathlib import Path

from rmipo import cli
from rmipo.tiny.world import load_world_config


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("--config", required=True, help="the knobs, such as recipes/tiny/world.yaml")
    parser.add_argument("--output", default="outputs/tiny/world", type=Path, help="default: %(default)s")
    options = parser.parse_args()
    config = load_world_config(options.config)

    from rmipo.tiny.files import write_world  # imports torch, which takes seconds

    print(f"world: {options.output} {'made' if write_world(options.output, config) else 'exists and is kept'}")
