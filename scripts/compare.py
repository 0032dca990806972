"""Compare methods on one setting: from one model, on the same pairs, each at a learning rate tuned alike.

    make compare MODEL=tiny METHODS=dpo,simpo SEEDS=0,1,2 NOISE=0,0.15 WORKERS=2 ARGS="--num_train_epochs 1"
    make margins MODEL=tiny [WORKERS=2]

`make train MODEL=...` comes first: all runs start from its SFT model. METHODS are some of the eleven, sft-chosen (SFT on the
chosen responses), fidelity-sequence, fidelity-release, initial-prior and shuffled; by default the eleven and sft-chosen. ARGS
override every recipe. NOISE is for tiny alone: only its labels can be swapped. Every method tries the learning rates of
recipes/<model>/search.yaml and is measured on one part of the held-out prompts; the table is about the others.

make margins: does a margin have to belong to its pair, and how much does tuning matter? It trains the arms and grids of
recipes/<model>/margins.yaml. Finished runs are kept in outputs/<model>/compare/runs.jsonl, or margins/runs.jsonl: an
interrupted command goes on where it was.
"""

import os
from pathlib import Path

# Before anything reads them. One GPU: transformers would copy the model to all that one process sees.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

from rmipo import cli
from rmipo.launch.choices import choose_stages, refuse


@cli.main
def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    parser = cli.options(__doc__, "MODEL", "METHODS", "SEEDS", "NOISE", "WORKERS", "ARGS")
    parser.add_argument("--margins", action="store_true", help="the study of margins.yaml")
    args = parser.read()
    env = os.environ | cli.variables(args)
    refuse(env, "DRY", "SLURM", "DATA")
    choose_stages({**env, "STAGE": ""})
    from rmipo.compare import program  # imports torch and TRL, which takes seconds

    return program.margins(env) if args.margins else program.compare(env)
