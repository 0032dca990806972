"""Train a policy online: in every round it answers new prompts, an oracle scores them, and it trains on the pairs.

    make online MODEL=smollm2-135m-instruct METHOD=simpo ROUNDS=2 ARGS="--learning_rate 2e-5"

recipes/<model>/online.yaml states prompts per round, oracle, selection, and overrides of the recipe per round. Each round is an
ordinary run in outputs/<model>/online-<method>/round-<n>; rounds.md and rounds.png there show every policy on held-out prompts.
After an interruption the same command goes on, and more ROUNDS add to those there are.
"""

import os
import shlex
import sys
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import choose_method, choose_stages, refuse, whole_number


@cli.main
def main() -> int:
    parser = cli.options(__doc__, "MODEL", "METHOD", "ROUNDS")
    parser.add_argument("--prompts_per_round", type=int, help="in place of that of online.yaml")
    parser.add_argument("--held_out_prompts", type=int, help="in place of that of online.yaml")
    args, overrides = parser.parse_known_args([*cli.split(os.environ.get("ARGS", "")), *sys.argv[1:]])
    os.chdir(Path(__file__).parent.parent)
    refuse(os.environ, "DRY", "SLURM", "DATA")
    model, _ = choose_stages({"MODEL": args.model or "smollm2-135m-instruct"})
    method, _ = choose_method({"METHOD": args.method})
    count = whole_number({"ROUNDS": args.rounds}, "ROUNDS", 3)

    from rmipo.evaluation.target import find_target
    from rmipo.generation.engines import release_memory
    from rmipo.generation.pairs import make_pairs
    from rmipo.launch.online import OnlineConfig, Round
    from rmipo.launch.pipeline import load_steps, make_weights
    from rmipo.launch.train import Program
    from rmipo.recipe.files import read_yaml, typed
    from rmipo.reporting.online import measure, report

    path = Path(f"recipes/{model}/online.yaml")
    sizes = {n: size for n in ("prompts_per_round", "held_out_prompts") if (size := getattr(args, n)) is not None}
    config = typed(OnlineConfig, read_yaml(path) | sizes, path)
    make_weights(model)
    start = find_target(model, "initial", Path("outputs"), [])
    generation = start.settings.get("generation", {})
    env = {**os.environ, "MODEL": model, "METHOD": method, "ARGS": shlex.join(overrides)}
    home, program = Path(f"outputs/{model}/online-{method}"), Program()
    rounds = [Round(config, home, start.folder, number + 1) for number in range(count)]
    for each in rounds:
        load_steps(model, ["rmipo"], each.environment(env))  # its recipe is refused before anything is sampled
    rows = [{"round": 0, **measure(start.folder, start.folder, config, generation, home / "round-0")}]
    for each in rounds:
        print(f"## round {each.number} of {count}: pairs of {each.policy}", flush=True)
        pairs = make_pairs(each.policy, generation, each.pairs_config, each.pairs)
        print(f"{pairs['pairs']} pairs of {pairs['prompts']} prompts, mean score {pairs['mean_score']:.3f}", flush=True)
        release_memory()  # the training is another process
        if code := program.run([sys.executable, "scripts/launch.py"], env=each.environment(env)):
            return code
        measured = measure(each.folder, start.folder, config, generation, each.folder / "eval")
        rows.append({"round": each.number, **measured})
        print(report(rows, home), flush=True)
    print(f"online: {home}/rounds.md and rounds.png")
    return 0
