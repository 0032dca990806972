"""Evaluate a trained model as the paper does. Settings are in recipes/<model>/eval.yaml.

    make eval MODEL=llama3-8b-instruct METHOD=rmipo BENCH=alpacaeval
    python scripts/evaluate.py --model tiny --method rmipo --bench all [--max_cost 5] [--set alpacaeval.concurrency=2]

BENCH is alpacaeval, mtbench, leaderboard, hh or all. METHOD=initial is the model before preference training. The judge
of the first two is any OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY. Results go to
<outputs>/<model>/<method>/eval/<bench>.json; a finished one is kept, an unfinished one is continued, and one of other
weights than those that are there now is refused.
"""

import argparse
import json
import os
import shlex
import sys
import traceback
from pathlib import Path

from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.target import load_settings, model_folder
from rmipo.fingerprints import trained_fingerprint

ROOT = Path(__file__).parent.parent


def command_line() -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=environment("MODEL") or "tiny", help="folder in recipes/")
    parser.add_argument("--method", default=environment("METHOD") or "rmipo", help="folder in <outputs>/<model>/")
    parser.add_argument("--bench", default=environment("BENCH") or "all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--max_cost", type=float, default=environment("MAX_COST") or None, help="US dollars a judge")
    parser.add_argument("--set", action="append", default=[], help="e.g. mtbench.judge_model=gpt-4")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    return parser.parse_args(sys.argv[1:] or shlex.split(environment("ARGS", "")))


def main() -> None:
    args = command_line()
    benches = list(BENCHMARKS) if args.bench == "all" else [args.bench]
    recipe = ROOT / "recipes" / args.model / "rmipo.yaml"
    try:
        settings = load_settings(recipe.with_name("eval.yaml"), args.set)
        folder = model_folder(recipe, args.outputs, args.method)
        weights = trained_fingerprint(folder)
    except ValueError as error:
        sys.exit(str(error))
    for bench, benchmark in BENCHMARKS.items():
        block = settings.setdefault(bench, {})
        if "generation" in benchmark.defaults:
            block["generation"] = settings.get("generation", {}) | block.get("generation", {})
        if "max_cost" in benchmark.defaults and args.max_cost is not None:
            block["max_cost"] = args.max_cost

    failed = []
    for bench in benches:
        path = folder / "eval" / f"{bench}.json"
        if path.is_file():
            if json.loads(path.read_text()).get("fingerprint") == weights:
                print(f"{bench}: finished before, see {path}; delete it to evaluate again")
            else:
                print(
                    f"{bench}: {path} is of other weights than those now in {folder}. Delete it, and the folder "
                    f"{path.with_suffix('')} if there is one, to evaluate these",
                    file=sys.stderr,
                )
                failed.append(bench)
            continue
        try:
            result = BENCHMARKS[bench].run(folder, path.parent, settings.get(bench, {}))
        except Exception as error:  # one benchmark's failure, such as a missing key, doesn't stop the others
            if not isinstance(error, ValueError):
                traceback.print_exc()
            print(f"{bench}: {error}", file=sys.stderr)
            failed.append(bench)
            continue
        if result is None:
            print(f"{bench}: answers are generated, nothing was judged; see {path.parent}")
            continue
        write(path, {"bench": bench, "model": str(folder), "fingerprint": weights, **result, "finished": True})
        print(f"{bench}: {path}")
        for name, value in result["metrics"].items():
            print(f"  {name:30s} {value:.2f}")
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
