"""One SGD step with a learning rate of 1, cut by pairs or by tokens: the change of the weights is the gradient.

python -m tests.helpers.token_batches_worker FOLDER MAX_TOKENS, in each process of a torch.distributed launch
"""

import sys
from pathlib import Path

import torch

from tests.helpers.small_models import make_pairs
from tests.helpers.trainers import make_trainer


def gradients(output: Path, max_tokens: int | None) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Gradients by parameter of one step over 13 pairs, and the pairs in each of this rank's micro-batches."""
    trainer = make_trainer(
        output, make_pairs(13, seed=4, prompt_lengths=(1, 30)), global_batch_size=13, optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0, max_tokens_per_micro_batch=max_tokens,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    (step,) = trainer.get_train_dataloader().batch_sampler
    trainer.train()
    after = trainer.model.named_parameters()
    return {name: before[name] - parameter.detach() for name, parameter in after}, [batch.real for batch in step]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = gradients(folder / "run", int(sys.argv[2]))
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")
