"""Run everything behind one of the paper's tables: trainings, evaluations, the table. What is done is skipped.

make reproduce TABLE=1 DRY=1      # list the steps and their GPU hours
make reproduce TABLE=1
make reproduce TABLE=2 MODEL=tiny
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmipo.reporting.chain import PAPER_GPUS, chain, summary
from rmipo.reporting.results import ReportError
from rmipo.reporting.tables import TABLES, build_table

OWN_VARIABLES = ("TABLE", "MODEL", "METHOD", "STAGE", "DRY", "ARGS")  # each step says its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, default=os.environ.get("TABLE"), help=f"one of {sorted(TABLES)}")
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="another model than the paper's")
    parser.add_argument("--dry", action="store_true", default=os.environ.get("DRY", "0") not in ("", "0"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.parse_args()

    try:
        if args.table is None:
            raise ReportError(f"which table? Say TABLE=..., one of {sorted(TABLES)}")
        steps = chain(build_table(args.table, [args.model] if args.model else []), args.outputs)
    except ReportError as error:
        sys.exit(str(error))

    for number, step in enumerate(steps, start=1):
        mark = "done" if step.done else "    "
        hours = "" if step.hours is None else f"   # {step.hours:g} h on {PAPER_GPUS} GPUs in the paper"
        print(f"{number:3d} {mark} {step.command}{hours}")
    print(summary(steps))
    if args.dry:
        return

    environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    for number, step in enumerate(steps, start=1):
        if step.done:
            continue
        print(f"\n[{number}/{len(steps)}] {step.command}", flush=True)
        if subprocess.run(shlex.split(step.command), env=environment).returncode != 0:
            sys.exit(
                f"Step {number} failed: {step.command}\nRepair it and run the same again; finished steps are skipped."
            )
    table = f"make table N={args.table}" + (f" MODEL={args.model}" if args.model else "")
    subprocess.run(shlex.split(table), env=environment, check=True)


if __name__ == "__main__":
    main()
