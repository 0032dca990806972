"""Make preference pairs from a model's own answers, for training that very model.

    make pairs MODEL=smollm2-135m-instruct
    make pairs MODEL=llama3-8b-instruct PROMPTS=my_prompts.jsonl ARGS="--oracle.reward_model folder --answers 5"
    make pairs MODEL=tiny METHOD=sft PROMPTS=prompts.jsonl ARGS="--oracle.function my_oracle.py:score --selection pmi"

The keys of recipes/<model>/pairs.yaml are the defaults (see `rmipo.generation.pairs.PairsConfig`), the decoding is that of
eval.yaml. METHOD is the folder of the checkpoint in outputs/<model>/, `initial` by default: what preference training starts
from. The pairs go to outputs/<model>/pairs, of another METHOD to outputs/<model>/pairs-<method>, or to OUTPUT: a folder that
`make train ... DATA=<folder>` trains on. After an interruption the same command goes on.
"""

import os
import shlex
import sys
from pathlib import Path

from rmipo.cli import program


@program()
def main() -> None:
    env = os.environ
    model, method = env.get("MODEL") or "tiny", env.get("METHOD") or "initial"
    arguments = sys.argv[1:] or shlex.split(env.get("ARGS", ""))
    if arguments in (["--help"], ["-h"]):
        print(__doc__)
        return
    os.chdir(Path(__file__).parent.parent)

    from rmipo.evaluation.target import find_target
    from rmipo.generation.pairs import load_pairs_config, make_pairs

    config = load_pairs_config(Path(f"recipes/{model}/pairs.yaml"), arguments, env.get("PROMPTS"))
    target = find_target(model, method, Path("outputs"), [])
    output = Path(env.get("OUTPUT") or f"outputs/{model}/pairs" + f"-{method}" * (method != "initial"))
    result = make_pairs(target.folder, target.settings.get("generation", {}), config, output)
    print(f"pairs: {output} with {result['pairs']} pairs of {result['prompts']} prompts")
    for reason, count in result["dropped"].items():
        print(f"  dropped: {count} ({reason})")
    print(f"  mean score {result['mean_score']:.3f}, mean of the best answers {result['best_score']:.3f}")


if __name__ == "__main__":
    main()
