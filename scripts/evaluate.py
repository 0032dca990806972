"""Evaluate a model on the benchmarks of the paper and a few more.

    make eval MODEL=llama3-8b-instruct METHOD=rmipo BENCH=alpacaeval
    make eval MODEL=path/to/model BENCH=leaderboard ARGS="--set leaderboard.limit=100"

MODEL is a setting (folder in recipes/, whose eval.yaml has the settings), a folder with a model, or the id of a model on
the hub. METHOD, of a setting alone, is one folder or several in <outputs>/<model>/; `initial` is the model before preference
training. The judge is any OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY.

Results go to <model's folder>/eval/<bench>.json, with EVAL_NAME to eval/<EVAL_NAME>/<bench>.json. docs/EVALUATION.md has more.
"""

import itertools
import json
import math
import sys
import traceback
from pathlib import Path

from rmipo import cli
from rmipo.errors import EvaluationError, UserError
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.benchmark import Benchmark, benchmark_settings, contradictions, publish
from rmipo.files import locked, write_atomically
from rmipo.fingerprints import has_weights, prompting_fingerprint, trained_fingerprint
from rmipo.launch.choices import check_names
from rmipo.record import environment


def evaluate(folder: Path, settings: dict, benchmark: Benchmark, name: str) -> None:
    """Run one benchmark, unless its result is there. Raises EvaluationError for one that may not be taken for this."""
    path = folder / "eval" / name / f"{benchmark.name}.json"
    weights = trained_fingerprint(folder) if has_weights(folder) else None
    made_of = {"fingerprint": weights, "prompting": prompting_fingerprint(folder)}
    if path.is_file():
        found = json.loads(path.read_text())
        others = {key: value for key, value in settings.items() if key != benchmark.parts}
        different = contradictions(others, found["settings"])
        different += ["it is of other weights"] * (weights not in (None, found.get("fingerprint")))
        changed = found.get("prompting") != made_of["prompting"]
        different += ["it is of another tokenizer, chat template or generation_config.json"] * changed
        if different:
            fix = f"Delete it and, if it is there, {path.with_suffix('')}; or name this evaluation: EVAL_NAME=..."
            raise EvaluationError(f"{path} is finished, and not what is asked for: {'; '.join(different)}. {fix}")
        asked, done = (values.get(benchmark.parts, []) for values in (settings, found["settings"]))
        settings[benchmark.parts] = done + [part for part in asked if part not in done]
        if settings[benchmark.parts] == done:
            print(f"{benchmark.name}: finished before, see {path}; delete it to evaluate again")
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.run(folder, path.parent, settings)
    if result is None:
        print(f"{benchmark.name}: answers are generated, nothing was judged; see {folder / 'eval/answers'}")
        return
    if no_number := [name for name, value in result["metrics"].items() if not math.isfinite(value)]:
        raise EvaluationError(f"{', '.join(no_number)} of {folder}: nothing was counted, or the model's scores are NaN")
    made_by = {key: value for key, value in environment().items() if key in ("commit", "hardware")}
    content = {"bench": benchmark.name, "model": str(folder)} | made_of | made_by | result | {"finished": True}
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    print(f"{benchmark.name}: {path}")
    print("".join(f"  {metric:30s} {value:.2f}\n" for metric, value in result["metrics"].items()), end="")
    publish(folder, benchmark, result, name)  # last: W&B may not be reached


@cli.main
def main() -> None:
    parser = cli.options(__doc__, "MODEL", "METHOD", "BENCH", "TASKS", "EVAL_NAME", "SETTINGS", "MAX_COST")
    parser.add_argument("--set", action="append", default=[], metavar="BLOCK.KEY=VALUE", help="over the eval.yaml")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.read()
    bench, overrides = args.bench or "all", args.set
    benches = [b for b in BENCHMARKS.values() if bench == b.name or (bench == "all" and b.in_paper)]
    if not benches:
        raise EvaluationError(f"BENCH={bench} is none of {', '.join(BENCHMARKS)}, all (those of the paper)")
    if args.eval_name in (*BENCHMARKS, "answers"):
        raise EvaluationError(f"EVAL_NAME={args.eval_name} is taken by the evaluation itself")
    if args.tasks:
        overrides.append(f"leaderboard.tasks={json.dumps(args.tasks.replace(',', ' ').split())}")
    if args.max_cost:
        overrides += [f"{b.name}.max_cost={args.max_cost}" for b in benches if "max_cost" in b.defaults]
    model, methods = args.model or "tiny", args.method.replace(",", " ").split()
    check_names(model, methods)
    from rmipo.evaluation.target import find_target  # imports torch and TRL, which takes seconds

    settings = Path(args.settings) if args.settings else None
    targets = [find_target(model, method, args.outputs, overrides, settings) for method in methods or [None]]
    failed = []
    for target, benchmark in itertools.product(targets, benches):
        try:
            # Also another EVAL_NAME waits: it may take the same answers.
            with locked(target.folder / "eval" / f"{benchmark.name}.lock", "eval"):
                evaluate(target.folder, benchmark_settings(target.settings, benchmark), benchmark, args.eval_name)
        except Exception as error:  # one benchmark's failure, such as a missing key, doesn't stop the others
            if not isinstance(error, UserError):
                traceback.print_exc()
            print(f"{benchmark.title}: {error}", file=sys.stderr)
            failed.append(f"{benchmark.name} of {target.folder}")
    if failed:
        raise EvaluationError(f"not finished: {', '.join(failed)}")
