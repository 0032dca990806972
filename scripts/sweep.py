"""Search a method's hyperparameters on one setting, point by point: the grid of recipes/sweeps/<method>.yaml.

    make sweep MODEL=mistral-7b-base METHOD=simpo [GPUS=4] [DATA=...] [ARGS="--num_train_epochs 0.2"] [DRY=1]
    wandb sweep recipes/sweeps/simpo.yaml

The first needs no account: it trains what is not finished yet, keeps one line per finished point in sweep.jsonl, and
names the best by the file's held-out metric. In the second W&B's agent starts this program with --model, --method and
one point's --key=value. MODEL, METHOD, DATA, ARGS, GPUS and SHARDING mean what they mean in `make train`.

Preference accuracy does not see a policy that has collapsed: look at generations.jsonl of the best few, or evaluate
them, before believing the first.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from rmipo.launch import sweep as search
from rmipo.launch.pipeline import choose, choose_stages, named_files
from rmipo.run.stop import EXIT_STOPPED

ROOT = Path(__file__).parent.parent
SHOWN = 5


def main() -> int:
    os.chdir(ROOT)
    try:
        return one_point(sys.argv[1:]) if len(sys.argv) > 1 else whole_grid(dict(os.environ))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def one_point(arguments: list[str]) -> int:
    """Train the point of a command line, in this process's terminal and W&B run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in recipes/")
    parser.add_argument("--method", required=True, help="file in recipes/sweeps/")
    options, overrides = parser.parse_known_args(arguments)
    env = os.environ | {"MODEL": options.model, "METHOD": options.method}
    return launch(search.make_point(search.read_point(overrides), env))


def whole_grid(env: dict[str, str]) -> int:
    model, _ = choose_stages({**env, "STAGE": "rmipo"})
    method = choose("METHOD", env.get("METHOD", ""), list(named_files("recipes/sweeps")), "The searches")
    sweep = search.load_sweep(method, model)
    points = [search.make_point(values, env) for values in sweep.points]
    path = points[0].folder.parent / search.RECORD
    open_points = [point for point in points if not point.done]
    print(f"{len(points)} points, {len(open_points)} of them not finished; by {sweep.metric} ({sweep.goal}): {path}")
    if env.get("DRY", "0") not in ("", "0"):
        print("\n".join(search.arguments(point.values) for point in open_points))
        return 0

    failed = []
    bar = tqdm(total=len(points), initial=len(points) - len(open_points), desc=f"{model} {method}", unit="point")
    for point in open_points:
        point.folder.parent.mkdir(parents=True, exist_ok=True)
        bar.set_postfix_str(f"{search.arguments(point.values)}, see {point.folder}.log")
        with open(f"{point.folder}.log", "a") as log:
            code = launch(point, stdout=log, stderr=subprocess.STDOUT)
        lines = search.record(path, points, sweep.metric)
        if code == EXIT_STOPPED:
            bar.close()
            print("stopped; the same command goes on from there")
            return code
        if code:
            failed.append(point)
            bar.write(f"failed with exit code {code}: {search.arguments(point.values)}, see {point.folder}.log")
            if not lines:  # most likely no fault of this point
                bar.close()
                return code
        bar.update()
    bar.close()
    report(model, method, sweep, search.record(path, points, sweep.metric))
    return 1 if failed else 0


def launch(point: search.Point, **streams) -> int:
    """Exit code of `scripts/launch.py` for this point; without an account, W&B writes to the disk."""
    offline = {} if "WANDB_SWEEP_ID" in os.environ else {"WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    environment = os.environ | {"METHOD": "", "DATA": ""} | offline | point.environment
    return subprocess.run([sys.executable, "scripts/launch.py"], env=environment, **streams, check=False).returncode


def report(model: str, method: str, sweep: search.Sweep, lines: list[dict]) -> None:
    ordered = sweep.ranked(lines)
    print(f"{sweep.metric} of the {min(SHOWN, len(ordered))} best of {len(ordered)} points:")
    for line in ordered[:SHOWN]:
        print(f"  {line[sweep.metric]:.4f}  {search.arguments(line['values'])}  in {line['output_dir']}")
    best = search.arguments(ordered[0]["values"])
    print(f'best: make train MODEL={model} METHOD={method} ARGS="{best} --output_dir ..."')


if __name__ == "__main__":
    sys.exit(main())
