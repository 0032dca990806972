"""One of two processes of test_checkpoints.py: they meet in every step, until rank 1 falls silent in the third."""

import sys
import time

import torch
from transformers import TrainerState

from rmipo import cli
from rmipo.recipe.load import load_recipe
from rmipo.run.callbacks import SilenceWatchdog


@cli.program()
def main() -> None:
    args, _, _ = load_recipe("recipes/tiny/rmipo.yaml", overrides=sys.argv[1:]).parse()
    silence, state = SilenceWatchdog(), TrainerState()
    silence.on_train_begin(args, state, None)
    for state.global_step in range(5):
        if state.global_step == 2 and args.process_index == 1:
            time.sleep(600)
        torch.distributed.all_reduce(torch.ones(1))
        silence.on_step_end(args, state, None)


if __name__ == "__main__":
    main()
