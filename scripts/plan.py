"""What a run will cost: memory per GPU, steps, hours, disk. Needs no GPU and downloads no model.

    make plan MODEL=llama3-8b-instruct GPUS=8x80 [NODES=4] [METHOD=dpo] [STAGE=sft] [ARGS="--max_length 1024"]

GPUS is <GPUs of each machine>x<GB of one>, by default what this machine has; STAGE is rmipo unless it is sft.
The exit code is 1 if the estimate of the memory exceeds the GPU's.
"""

import os
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import check_choices

VARIABLES = ("MODEL", "STAGE", "METHOD", "DATA", "ARGS", "GPUS", "NODES", "SHARDING", "EXAMPLES", "TFLOPS")


def main() -> int:
    os.chdir(Path(__file__).parent.parent)
    options = cli.options(__doc__, *VARIABLES, STAGE="sft or rmipo (default: rmipo)").read()
    env = {**os.environ, "STAGE": "rmipo"} | cli.variables(options)
    check_choices(env)
    from rmipo.launch.cost import plan  # imports torch and TRL, which takes seconds

    return plan(env)


if __name__ == "__main__":
    cli.run(main)
