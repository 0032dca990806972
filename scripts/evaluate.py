"""Evaluate a model on the benchmarks of the paper and a few more.

    make eval MODEL=llama3-8b-instruct METHOD=rmipo BENCH=alpacaeval
    make eval MODEL=path/to/model BENCH=leaderboard ARGS="--set leaderboard.limit=100"
    make eval MODEL=owner/name BENCH=mtbench NAME=open-judge MAX_COST=5

MODEL is a setting (folder in recipes/, whose eval.yaml has the settings), a folder with a model, or the id of a model on
the hub; the last two are sampled as their own generation_config.json says. METHOD, of a setting alone, is one folder or
several in <outputs>/<model>/; `initial` is the model before preference training. The judge is any OpenAI-compatible
endpoint: OPENAI_BASE_URL and OPENAI_API_KEY.

Results go to <model's folder>/eval/<bench>.json, with NAME to eval/<NAME>/<bench>.json. A finished one is kept, an
unfinished one is continued, and one of other weights or other settings than these is refused.
"""

import argparse
import json
import os
import shlex
import sys
import traceback
from pathlib import Path

from rmipo.cli import program
from rmipo.errors import EvaluationError, UserError
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.benchmark import Benchmark, contradictions
from rmipo.evaluation.target import Target, find_target
from rmipo.files import write_atomically
from rmipo.fingerprints import has_weights, trained_fingerprint


def command_line() -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=environment("MODEL") or "tiny", help="setting, folder or hub id")
    parser.add_argument("--method", nargs="+", default=environment("METHOD", "").split(), help="default: rmipo")
    parser.add_argument(
        "--bench", default=environment("BENCH") or "all", help=f"{', '.join(BENCHMARKS)} or all, the paper's"
    )
    parser.add_argument("--name", default=environment("NAME") or "", help="of this evaluation, beside the usual one")
    parser.add_argument("--settings", type=Path, default=environment("SETTINGS"), help="another eval.yaml")
    parser.add_argument("--max_cost", type=float, default=environment("MAX_COST") or None, help="US dollars a judge")
    parser.add_argument("--tasks", default=environment("TASKS", ""), help="of the leaderboard, e.g. ifeval,gsm8k")
    parser.add_argument("--set", action="append", default=[], help="e.g. mtbench.judge_model=gpt-4")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    return parser.parse_args(sys.argv[1:] or shlex.split(environment("ARGS", "")))


def main() -> None:
    args = command_line()
    if args.bench not in (*BENCHMARKS, "all"):
        raise EvaluationError(f"BENCH={args.bench} is none of {', '.join(BENCHMARKS)}, all")
    if args.name in (*BENCHMARKS, "answers") or "/" in args.name:
        raise EvaluationError(f"NAME={args.name} can't be a folder beside those of {', '.join(BENCHMARKS)}, answers")
    benches = [b for b in BENCHMARKS.values() if args.bench == b.name or (args.bench == "all" and b.in_paper)]
    tasks = args.tasks.replace(",", " ").split()
    overrides = args.set + [f"leaderboard.tasks={json.dumps(tasks)}"] * bool(tasks)
    targets = [find_target(args.model, m, args.outputs, overrides, args.settings) for m in args.method or [None]]
    failed = []
    for target in targets:
        for benchmark in benches:
            try:
                evaluate(target, benchmark, args.name, args.max_cost)
            except Exception as error:  # one benchmark's failure, such as a missing key, doesn't stop the others
                if not isinstance(error, UserError):
                    traceback.print_exc()
                print(f"{benchmark.name}: {error}", file=sys.stderr)
                failed.append(f"{benchmark.name} of {target.folder}")
    if failed:
        raise EvaluationError(f"not finished: {', '.join(failed)}")


def evaluate(target: Target, benchmark: Benchmark, name: str, max_cost: float | None) -> None:
    """Run one benchmark, unless its result is there. Raises EvaluationError for one that may not be taken for this."""
    folder, bench = target.folder, benchmark.name
    settings = dict(target.settings.get(bench, {}))
    if "generation" in benchmark.defaults:
        settings["generation"] = target.settings.get("generation", {}) | settings.get("generation", {})
    if "max_cost" in benchmark.defaults and max_cost is not None:
        settings["max_cost"] = max_cost
    path = folder / "eval" / name / f"{bench}.json"
    weights = trained_fingerprint(folder) if has_weights(folder) else None
    if path.is_file():
        found = json.loads(path.read_text())
        if weights not in (None, found.get("fingerprint")):
            raise EvaluationError(
                f"{path} is of other weights than those now in {folder}. Delete it, and the folder "
                f"{path.with_suffix('')} if there is one, to evaluate these"
            )
        asked, done = (values.get(benchmark.parts, []) for values in (settings, found["settings"]))
        added = [part for part in asked if part not in done]
        others = {key: value for key, value in settings.items() if key != benchmark.parts}
        if different := contradictions(others, found["settings"]):
            raise EvaluationError(
                f"{path} is finished with other settings: {'; '.join(different)}. Give this evaluation a name of its "
                "own (NAME=...), take the settings back, or delete that file"
            )
        if not added:
            print(f"{bench}: finished before, see {path}; delete it to evaluate again")
            return
        settings[benchmark.parts] = done + added
    path.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.run(folder, path.parent, settings)
    if result is None:
        print(f"{bench}: answers are generated, nothing was judged; see {folder / 'eval/answers'}")
        return
    content = {"bench": bench, "model": str(folder), "fingerprint": weights, **result, "finished": True}
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    print(f"{bench}: {path}")
    for metric, value in result["metrics"].items():
        print(f"  {metric:30s} {value:.2f}")


if __name__ == "__main__":
    with program():
        main()
