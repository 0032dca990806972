"""Run everything behind one of the paper's tables: trainings, evaluations, the table. What is done is skipped.

    make reproduce TABLE=1 DRY=1      # list what is left to do
    make reproduce TABLE=1
    make reproduce TABLE=2 MODEL=tiny

What else is given to make (GPUS, SHARDING, MAX_COST) reaches every step.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import refuse
from rmipo.reporting.results import ReportError, check_model
from rmipo.reporting.tables import TABLES, build_table, fill

OUTPUTS = Path("outputs")  # where trainings and evaluations write
OWN_VARIABLES = ("TABLE", "MODEL", "METHOD", "STAGE", "BENCH", "DRY")  # each step says its own


@cli.main
def main() -> int:
    parser = cli.options(__doc__, "MODEL", MODEL="another model than the paper's")
    parser.add_argument("--table", type=int, default=os.environ.get("TABLE") or None, help=f"one of {sorted(TABLES)}")
    parser.add_argument("--dry", action="store_true", default=cli.is_on(os.environ, "DRY"), help="list the steps")
    args = parser.parse_args()
    if args.table is None:
        raise ReportError(f"which table? Say TABLE=..., one of {sorted(TABLES)}")
    # Options of a training are none of an evaluation, other pairs make other runs than the table's, and a job that is only
    # submitted isn't there for the next step.
    refuse(os.environ, "ARGS", "DATA", "SLURM")
    if args.model:
        check_model(OUTPUTS, args.model)
    cells = fill(build_table(args.table, [args.model] if args.model else []), OUTPUTS).cells
    steps = list(dict.fromkeys(text for commands in cells["commands"] for text in commands))  # row by row, each once
    print("".join(f"{number:3d} {step}\n" for number, step in enumerate(steps, start=1)), end="")
    trainings = sum(step.startswith("make train") for step in steps)
    print(f"{len(steps)} steps left: {trainings} trainings, {len(steps) - trainings} evaluations")
    if args.dry:
        return 0
    environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    steps.append(f"make table N={args.table}" + (f" MODEL={args.model}" if args.model else ""))
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step}", flush=True)
        if subprocess.run(shlex.split(step), env=environment).returncode != 0:
            print(f"Step {number} failed: {step}\nRun the same again: finished steps are skipped", file=sys.stderr)
            return 1
    return 0
