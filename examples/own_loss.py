"""A loss of your own in our trainer: the packed step, the cached reference, the resume are there; you write the formula.

python examples/own_loss.py MODEL DATASET
"""

import sys
from pathlib import Path

from datasets import load_dataset
from torch import Tensor

from rmipo import OBJECTIVES, PairScores, PreferenceConfig, PreferenceTrainer
from rmipo.objectives import Objective, ObjectiveOutput
from rmipo.objectives.base import Positive, hyperparameters, make_output


@hyperparameters
class Hinge(Objective):
    """max(0, delta - (A_w - A_l)), A the mean log-probability of a response's tokens."""

    name = "hinge"
    # needs = frozenset({"reference"}) would give `scores.logratios(...)`, {"prior"} the scores without their prompts.

    delta: Positive = 1.0

    def __call__(self, scores: PairScores, state: dict[str, Tensor] | None = None) -> ObjectiveOutput:
        chosen, rejected = scores.logps(per_token=True)
        return make_output((self.delta - (chosen - rejected)).clamp(min=0), chosen, rejected)


OBJECTIVES[Hinge.name] = Hinge

if __name__ == "__main__":
    model, dataset = sys.argv[1:]
    files = {"path": "json", "data_files": dataset} if Path(dataset).is_file() else {"path": dataset}
    args = PreferenceConfig(
        output_dir="outputs/hinge", objective={"name": "hinge", "delta": 0.5}, max_length=128, max_prompt_length=64
    )
    PreferenceTrainer(model, args, load_dataset(**files, split="train")).train()
