"""Train a setting: run its stages one after the other, on the GPUs that are there.

    make train MODEL=tiny
    make train MODEL=llama3-8b-instruct METHOD=dpo ARGS="--learning_rate 5e-7" GPUS=4 DRY=1

A finished stage is not trained again. A stage that a signal stops saves first and ends with exit code 75: the same
command goes on from there. SLURM=1 adds the options of sbatch in SBATCH_ARGS.
"""

from rmipo import cli
from rmipo.launch.choices import choose_stages


@cli.main
def main() -> int:
    names = ("MODEL", "STAGE", "METHOD", "DATA", "ARGS", "GPUS", "NODES", "SHARDING", "SLURM", "DRY")
    env = cli.environment(__file__, __doc__, *names)
    choose_stages(env)
    from rmipo.launch.train import train  # imports torch and DeepSpeed, which takes seconds

    return train(env)
