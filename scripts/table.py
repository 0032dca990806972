"""Print one of the paper's tables, or one of any benchmark, from result files.

    make table N=1 MODEL=tiny EVAL_NAME=llama3-70b
    make table BENCH=constraints,specificity MODEL=smollm2-135m-instruct AGAINST=dpo
    make table WINS=1 BENCH=mtbench MODEL=llama3-8b-instruct   # win rates between any two methods

N: the paper's number, ours, and the difference; --differences prints it also where judge or decoding are not the paper's.
BENCH (several with commas, or all): every evaluated method by every metric, and how far AGAINST (default: rmipo) is ahead of
each. Writes Markdown, CSV and LaTeX to <outputs>/reports/, and prints the Markdown.
"""

import os
from pathlib import Path

from rmipo import cli
from rmipo.evaluation import BENCHMARKS
from rmipo.files import write_atomically
from rmipo.reporting.render import FORMATS, render_wins
from rmipo.reporting.results import OURS, ReportError, check_model
from rmipo.reporting.tables import TABLES, benchmark_table, build_table, fill, win_rates


@cli.main
def main() -> None:
    parser = cli.options(
        __doc__, "MODEL", "BENCH", "EVAL_NAME", "AGAINST", AGAINST="the method that others are held to"
    )
    parser.add_argument("--number", type=int, default=os.environ.get("N") or None, help=f"one of {sorted(TABLES)}")
    parser.add_argument("--wins", action="store_true", default=cli.is_on(os.environ, "WINS"), help="win rates")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    parser.add_argument("--differences", action="store_true", help="print all differences to the paper")
    args = parser.read()
    benches = list(BENCHMARKS) if args.bench == "all" else args.bench.replace(",", " ").split()
    if args.number is None and not (args.model and (benches or args.wins)):
        raise ReportError(f"which table? Say N=..., one of {sorted(TABLES)}, or BENCH=... and MODEL=...")
    if not BENCHMARKS.keys() >= set(benches):
        raise ReportError(f"BENCH={args.bench}: known are {', '.join(BENCHMARKS)}, all")
    if args.model:
        check_model(args.outputs, args.model)

    if args.wins:
        bench = benches[0] if benches else "alpacaeval"
        texts, name = render_wins(*win_rates(args.outputs, args.model, bench, args.eval_name)), f"wins-{bench}"
    else:
        if args.number is not None:
            table, name = build_table(args.number, [args.model] if args.model else []), f"table{args.number}"
        else:
            table = benchmark_table(args.outputs, args.model, benches, args.eval_name)
            name = f"table-{'-'.join(benches)}"
        filled = fill(table, args.outputs, args.differences, args.eval_name, args.against or OURS)
        texts = {suffix: form(filled) for suffix, form in FORMATS.items()}
    name = "-".join(filter(None, [name, Path(args.model).name, args.eval_name]))
    for suffix, text in texts.items():
        write_atomically(args.outputs / "reports" / f"{name}.{suffix}", text)
    print(f"{texts['md']}\nWritten to {args.outputs}/reports/{name}.{{{','.join(texts)}}}")
