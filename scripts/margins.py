"""Does a margin have to belong to its pair, and how much does tuning matter?

    make margins MODEL=tiny [WORKERS=2]

Trains the arms and grids of recipes/<model>/margins.yaml, all from one SFT model: RMiPO against RMiPO with the margins of other
pairs, and the outcomes over a grid of hyperparameters. `make train MODEL=tiny` comes first. Finished runs are kept in
outputs/<model>/margins/runs.jsonl; the same command goes on after them and writes report.md and spread.png beside it.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when torch is imported

from rmipo import cli
from rmipo.launch.choices import choose_stages, refuse


@cli.main
def main() -> int:
    env = cli.environment(__file__, __doc__, "MODEL", "WORKERS", "ARGS")
    refuse(
        env,
        ["DRY", "SLURM", "DATA"],
        "make margins trains its runs on this machine, on the setting's own pairs; leave it out",
    )
    choose_stages({**env, "STAGE": ""})
    from rmipo.compare.margins import margins  # imports torch and TRL, which takes seconds

    return margins(env)
