"""Search a method's hyperparameters on one setting, point by point: the grid of recipes/sweeps/<method>.yaml.

    make sweep MODEL=mistral-7b-base METHOD=simpo [GPUS=4] [DATA=...] [ARGS="--num_train_epochs 0.2"] [DRY=1]
    source .venv/bin/activate && wandb sweep recipes/sweeps/simpo.yaml

The first needs no account: it trains what is not finished yet, keeps one line per finished point in sweep.jsonl, and
names the best by the file's held-out metric. Points that finished on other data or another model are refused. In the
second W&B's agent starts this program with one point's --key=value after the options: that point alone is trained.

Preference accuracy does not see a policy that has collapsed: look at generations.jsonl of the best few, or evaluate
them, before believing the first.
"""

import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from rmipo import cli
from rmipo.launch.choices import choose_stages, is_on, named_files, refuse


@cli.main
def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    options = cli.options(__doc__, "MODEL", "METHOD", "DATA", "ARGS", "GPUS", "SHARDING", "DRY")
    given, values = options.parse_known_args()
    env = os.environ | cli.variables(given)
    refuse(env, "SLURM")
    model, _ = choose_stages({**env, "STAGE": "rmipo"})
    method = cli.choose("METHOD", env.get("METHOD", ""), list(named_files("recipes/sweeps")), "The searches")

    from rmipo.fingerprints import has_weights
    from rmipo.launch import sweep as search
    from rmipo.launch.train import Program
    from rmipo.recipe.files import override_value
    from rmipo.run.callbacks import EXIT_STOPPED

    program = Program()

    def train(point: search.Point, **streams) -> int:
        # W&B's agent has an account; without one, W&B writes to the disk.
        tracking = {} if "WANDB_SWEEP_ID" in os.environ else {"WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
        return program.run([sys.executable, "scripts/launch.py"], env=point.environment | tracking, **streams)

    # ------------------ The points
    if values:
        pairs = [value.removeprefix("--").partition("=") for value in values]
        return train(search.make_point({key: override_value(text) for key, _, text in pairs}, env))
    sweep = search.load_sweep(method, model)
    points = [search.make_point(point, env) for point in sweep.points]
    sweep.check_metric(points[0].step.recipe)
    path = Path(points[0].step.output_dir).with_name(search.RECORD)
    done = [point for point in points if point.step.is_done()]
    open_points = [point for point in points if point not in done]
    print(f"{len(points)} points, {len(open_points)} not finished; by {sweep.logged} ({sweep.metric.goal}): {path}")
    if is_on(env, "DRY"):
        print("\n".join(search.arguments(point.values) for point in open_points))
        return 0
    # A finished run that is started again ends at once, or refuses where its data or model have changed since.
    for point in [point for point in done if has_weights(Path(point.step.output_dir))][:1]:
        if code := train(point, stdout=subprocess.DEVNULL):
            return code

    # ------------------ Train those that are not finished
    path.parent.mkdir(parents=True, exist_ok=True)
    code = 0
    for point in tqdm(open_points, unit="point"):
        with open(f"{point.step.output_dir}.log", "a") as log:
            ended = train(point, stdout=log, stderr=subprocess.STDOUT)
        if ended == EXIT_STOPPED:
            return ended  # the same command goes on from there
        if ended:
            print(f"failed with exit code {ended}: {search.arguments(point.values)}, see {log.name}")
        code = code or ended
        if not search.record(path, points, sweep.logged):  # the first one failed, most likely by no fault of its own
            return code

    # ------------------ The best
    ranked = sweep.ranked(search.record(path, points, sweep.logged))
    print(f"{sweep.logged} of the best of {len(ranked)} points:")
    for line in ranked[:5]:
        print(f"  {line[sweep.logged]:.4f}  {search.arguments(line['values'])}  in {line['output_dir']}")
    best = search.arguments(ranked[0]["values"])
    print(f'best: make train MODEL={model} METHOD={method} ARGS="{best} --output_dir ..."')
    return 1 if code else 0
