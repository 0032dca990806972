"""Compare methods on one setting: from one model, on the same pairs, each at a learning rate tuned alike.

    make compare MODEL=tiny
    make compare MODEL=tiny METHODS=dpo,simpo SEEDS=0,1,2 NOISE=0,0.15 WORKERS=2 ARGS="--num_train_epochs 1"
    make compare MODEL=smollm2-135m-instruct METHODS=rmipo,simpo,dpo,simper,sft-chosen SEEDS=0,1 NOISE=0

METHODS are some of the eleven, sft-chosen (SFT on the chosen responses), fidelity-sequence, fidelity-release and
initial-prior (other readings of RMiPO); rmipo is always among them; by default the eleven and sft-chosen. ARGS override
every recipe. NOISE is for tiny alone: only its labels can be swapped.

Every method tries the learning rates of recipes/<model>/search.yaml with a seed of its own and is measured on one part of the
held-out prompts; the table is about the others. Finished runs are kept in outputs/<model>/compare/runs.jsonl, so that an
interrupted comparison goes on where it was.
"""

import os

# Before anything reads them. One GPU: transformers would copy the model to all that one process sees.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

from rmipo import cli
from rmipo.launch.choices import choose_stages, refuse


@cli.main
def main() -> int:
    env = cli.environment(__file__, __doc__, "MODEL", "METHODS", "SEEDS", "NOISE", "WORKERS", "ARGS")
    refuse(env, ["DRY", "SLURM"], "make compare trains its runs on this machine, at once; leave it out")
    refuse(env, ["DATA"], "make compare trains on the setting's own pairs; leave it out")
    choose_stages({**env, "STAGE": ""})
    from rmipo.compare.program import compare  # imports torch and TRL, which takes seconds

    return compare(env)
