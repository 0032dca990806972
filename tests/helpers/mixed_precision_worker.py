"""Two steps in bfloat16 per case, on two processes under FSDP2 or ZeRO-3.

`start("zero3", FOLDER)` and `start("fsdp2", FOLDER)` train FOLDER/model and write FOLDER/<sharding>.pt: losses, and the
bytes that ZeRO-3 keeps for each parameter.
"""

import gc
import sys
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.helpers.launched import Launched, launch
from tests.helpers.small_models import make_pairs, make_trainer

# name -> type of the weights as they are loaded, attention, whether adapters are trained
CASES = {
    "bfloat16": ("bfloat16", "segment", False),
    "bfloat16, fused head": ("bfloat16", "flex", False),
    "float32 weights": ("float32", "segment", False),
    "adapters": ("bfloat16", "segment", True),
}


def start(sharding: str, folder: Path) -> Launched:
    worker = ["tests/helpers/mixed_precision_worker.py", sharding, str(folder)]
    on_cpus = [] if sharding == "zero3" else ["tests/helpers/fsdp2_on_cpus.py"]
    return launch([*on_cpus, *worker], processes=2, sharding=sharding)


class Kept(TrainerCallback):
    """Bytes that DeepSpeed keeps in this process for each parameter, weights and the rest, after a step."""

    bytes = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = getattr(trained[0], "_z3_optimizer", None)
        if optimizer is None:  # FSDP2
            return
        states = optimizer.optimizer.state.values()
        rest = [optimizer.grad_partitions_flat_buffer, *optimizer.fp32_partitioned_groups_flat]
        rest += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        parameters = sum(p.ds_numel for p in trained)
        kept = ([p.ds_tensor for p in trained], rest)
        self.bytes = tuple(sum(tensor.nbytes for tensor in tensors) / parameters for tensors in kept)


def main(sharding: str, folder: Path) -> None:
    # Uncompiled it is plain tensor code; PyTorch refuses gradients on CPUs because the compiled one has none there.
    flex_attention._validate_device = lambda *tensors: None
    if sharding == "zero3":
        deepspeed.init_distributed()
    losses, kept = {}, {}
    for name, (dtype, kind, adapters) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa")
        if adapters:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        output, pairs = folder / sharding / name, make_pairs(16, seed=6)
        trainer = make_trainer(output, pairs, model=model, attention=kind, bf16=True, max_steps=2)
        counted = Kept()
        trainer.add_callback(counted)
        trainer.train()
        kept[name] = counted.bytes
        losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        del trainer, model
        gc.collect()
    if torch.distributed.get_rank() == 0:
        torch.save({"losses": losses, "kept": kept}, folder / f"{sharding}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
