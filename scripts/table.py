"""Print one of the paper's tables from result files: the paper's number, ours, and the difference.

    make table N=2
    make table N=1 MODEL=tiny
    make table N=1 EVAL_NAME=llama3-70b
    .venv/bin/python scripts/table.py --number 2 --outputs outputs

Writes Markdown, CSV and LaTeX to <outputs>/reports/, and prints the Markdown. Runs that differ in the seed alone are
averaged. Without --differences, a number that was made with another judge or decoding than the paper's, or in a trial,
is marked and stands without a difference.
"""

import os
from pathlib import Path

from rmipo import cli
from rmipo.reporting.filling import fill
from rmipo.reporting.render import FORMATS
from rmipo.reporting.results import ReportError, check_model
from rmipo.reporting.tables import TABLES, build_table


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--number", type=int, default=os.environ.get("N") or None, help=f"one of {sorted(TABLES)}")
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="another model than the paper's")
    parser.add_argument("--eval_name", default=os.environ.get("EVAL_NAME", ""), help=cli.VARIABLES["EVAL_NAME"])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    parser.add_argument("--differences", action="store_true", help="print all differences to the paper")
    parser.add_argument(
        "--allow_mixed_versions", action="store_true", help="print results of mixed versions or settings"
    )
    args = parser.read()
    if args.number is None:
        raise ReportError(f"which table? Say N=..., one of {sorted(TABLES)}")
    if args.model:
        check_model(args.outputs, args.model)

    table = build_table(args.number, [args.model] if args.model else [])
    filled = fill(table, args.outputs, args.allow_mixed_versions, args.differences, args.eval_name)
    folder = args.outputs / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join([f"table{args.number}", *(part for part in (args.model, args.eval_name) if part)])
    for extension, render in FORMATS.items():
        (folder / f"{name}.{extension}").write_text(render(filled))
    print(FORMATS["md"](filled))
    print(f"Written to {folder}/{name}.{{{','.join(FORMATS)}}}")


if __name__ == "__main__":
    cli.run(main)
