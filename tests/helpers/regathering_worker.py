"""Training under a ZeRO-3 that frees parameters after use, as it does with models of real size.

`launch(["tests/helpers/regathering_worker.py", FOLDER], processes=2)` writes FOLDER/sharded.pt.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from transformers import AutoModelForCausalLM

from tests.helpers.small_models import make_model, make_pairs, make_trainer

# All limits lie below the size of a layer, 7,000, and above that of a norm.
ZERO3 = {
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 2000,
        "stage3_prefetch_bucket_size": 900,
        "stage3_param_persistence_threshold": 40,
        "stage3_max_live_parameters": 4000,
        "stage3_max_reuse_distance": 100,
    },
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}
# name -> objective, attention, whether embeddings are tied
CASES = {
    "rmipo": ({"name": "rmipo"}, "segment", False),
    "rmipo, fused head": ({"name": "rmipo"}, "flex", False),
    "rmipo, fused head, tied": ({"name": "rmipo"}, "flex", True),
    "dpo, fused head": ({"name": "dpo", "beta": 0.1}, "flex", False),
    "kto, fused head": ({"name": "kto", "beta": 0.1}, "flex", False),
    "epsilon-dpo, flex": ({"name": "epsilon-dpo", "beta": 0.1}, "flex", False),
}


def save_models(folder: Path) -> None:
    for tied in (False, True):
        model = make_model()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(folder / f"tied-{tied}")


def train(folder: Path, output: Path, case: str, full: Callable, **arguments) -> tuple[list[dict], dict]:
    """The losses of three steps and of the evaluations after them, and the weights at the end, which `full` collects."""
    # Uncompiled it is plain tensor code; PyTorch refuses gradients on CPUs because the compiled one has none there.
    torch.nn.attention.flex_attention._validate_device = lambda *tensors: None
    objective, kind, tied = CASES[case]

    def load():
        return AutoModelForCausalLM.from_pretrained(folder / f"tied-{tied}", attn_implementation="sdpa")

    trainer = make_trainer(
        output / case, make_pairs(24, seed=6), objective, model=load(), eval_pairs=make_pairs(6, seed=9),
        ref_model=load() if objective["name"] == "epsilon-dpo" else None, attention=kind, optim="sgd",
        learning_rate=0.1, eval_strategy="steps", eval_steps=1, reference_cache_dir=str(output / case / "cache"),
        **arguments,
    )  # fmt: skip
    trainer.train()
    names = ("loss", "eval_loss")
    losses = [line[name] for line in trainer.state.log_history for name in names if name in line]
    return losses, full(trainer.model)


def main(folder: Path) -> None:
    deepspeed.init_distributed()
    fetch, gathered = PartitionedParameterCoordinator.fetch_sub_module, {"again": 0}

    def counting(self, module, forward):
        missing = [one for one in iter_params(module) if one.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        gathered["again"] += 0 if forward else len(missing)
        return fetch(self, module, forward)

    def full(model):
        # As saving does: it fails if a prefetch of the last evaluation is still under way.
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    PartitionedParameterCoordinator.fetch_sub_module = counting
    results = {}
    for case in CASES:
        gathered["again"] = 0
        results[case] = (*train(folder, folder / "sharded", case, full, deepspeed=ZERO3), gathered["again"])
        gc.collect()
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "sharded.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
