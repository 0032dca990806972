"""What preference training changed in the tiny setting: a table of the model before and after, on held-out prompts.

    .venv/bin/python scripts/toy_report.py --run outputs/tiny/rmipo

The run's record (run.json) says which model it started from and on which pairs. Both models answer the world's
questions and rank the held-out pairs.
"""

import json
from pathlib import Path

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.record import recorded_run

LABELS = {
    "right_probability": "probability of a right answer (exact)",
    "right": "samples: right",
    "boilerplate": "samples: boilerplate",
    "wrong": "samples: wrong",
    "garbled": "samples: garbled",
    "preference_accuracy": "preference accuracy",
    "preference_margin": "preference margin (nats/token)",
}


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="folder of the preference run")
    parser.add_argument("--world", default="outputs/tiny/world", type=Path, help="default: %(default)s")
    options = parser.parse_args()
    run = recorded_run(options.run)
    if run is None:
        raise ConfigError(f"{options.run} holds no run. Train it with make train MODEL=tiny.")

    from rmipo.data.chat import ChatFormat
    from rmipo.data.pairs import LIMITS, load_pairs, tokenize_pairs
    from rmipo.recipe.schema import DataConfig, ModelConfig, of_recipe
    from rmipo.tiny import judge
    from rmipo.tiny.files import read_world
    from rmipo.training.loading import load_model, load_tokenizer

    recipe = run["recipe"]
    data = of_recipe(DataConfig, recipe)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(options.run)))
    limits = {key: recipe[key] for key in LIMITS if key in recipe}
    limits |= {key: getattr(data, key) for key in ("max_dropped_fraction", "max_truncated_fraction")}
    pairs, _ = tokenize_pairs(load_pairs(data, "test"), ChatFormat.probe(tokenizer), **limits)
    world, report = read_world(options.world), {"pairs": len(pairs)}
    for name, path in {"before": recipe["model_name_or_path"], "after": options.run}.items():
        model = load_model(ModelConfig(model_name_or_path=str(path), dtype="auto"))
        report[name] = judge.evaluate(model, tokenizer, world) | judge.preference_metrics(model, pairs)

    before, after = report["before"], report["after"]
    print(f"\n{'':40}{'before':>10}{'after ' + recipe['objective']['name']:>18}")
    for key, label in LABELS.items():
        print(f"{label:40}{before[key]:10.3f}{after[key]:18.3f}")
    path = options.run / "report.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"\n{len(before['samples'])} samples at temperature 1; {len(pairs)} test pairs: {path}")
