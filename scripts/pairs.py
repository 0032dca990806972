"""Make preference pairs from a model's own answers, for training that very model.

    make pairs MODEL=smollm2-135m-instruct
    make pairs MODEL=llama3-8b-instruct PROMPTS=my_prompts.jsonl ARGS="--oracle.reward_model folder --answers 5"

The keys of recipes/<model>/pairs.yaml are the defaults, the decoding is that of eval.yaml. METHOD is the folder of the
checkpoint in outputs/<model>/. The pairs go to outputs/<model>/pairs, of another METHOD to pairs-<method> there, or to OUTPUT.
After an interruption the same command goes on.
"""

import os
import sys
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import choose_stages, refuse


@cli.main
def main() -> None:
    method = "folder of a run, or initial (the default)"
    parser = cli.options(__doc__, "MODEL", "METHOD", "PROMPTS", "OUTPUT", METHOD=method)
    parser.add_argument("--keep", action="store_true", help="keep finished pairs, whatever they were made with")
    args, overrides = parser.parse_known_args(sys.argv[1:] or cli.split(os.environ.get("ARGS", "")))
    os.chdir(Path(__file__).parent.parent)
    if not args.keep:  # else it is a stage of `make train`, which may be in a job
        refuse(os.environ, "DRY", "SLURM")
    (model, _), method = choose_stages({"MODEL": args.model or "tiny"}), args.method or "initial"
    output = Path(args.output or f"outputs/{model}/pairs" + f"-{method}" * (method != "initial"))
    if args.keep and (output / "pairs.json").is_file():
        print(f"pairs: {output} already exists and is kept")
        return

    from rmipo.evaluation.target import find_target
    from rmipo.generation.pairs import load_pairs_config, make_pairs
    from rmipo.launch.pipeline import make_weights

    config = load_pairs_config(Path(f"recipes/{model}/pairs.yaml"), overrides, args.prompts)
    make_weights(model)
    target = find_target(model, method, Path("outputs"), [])
    result = make_pairs(target.folder, target.settings.get("generation", {}), config, output)
    print(f"pairs: {output} with {result['pairs']} pairs of {result['prompts']} prompts")
    use = "used" if config.keep_cut else "dropped (keep_cut: true uses them)"
    print(f"  cut at generation.max_new_tokens: {result['cut']} of {result['answers']} answers, {use}")
    for reason, count in result["dropped"].items():
        print(f"  without a pair: {count} prompts ({reason})")
    print(f"  mean score {result['mean_score']:.3f}, of the best answers {result['best_score']:.3f}")
