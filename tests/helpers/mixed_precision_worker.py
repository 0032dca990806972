"""Two steps in bfloat16 per case, on two processes under FSDP2 or ZeRO-3.

`start("zero3", FOLDER)` and `start("fsdp2", FOLDER)` train FOLDER/model and write FOLDER/<sharding>.pt.
"""

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM

from tests.helpers.launched import Launched, launch
from tests.helpers.paths import ROOT
from tests.helpers.small_models import make_pairs
from tests.helpers.trainers import make_trainer

# name -> type of the weights as they are loaded, attention, whether adapters are trained
CASES = {
    "bfloat16": ("bfloat16", "segment", False),
    "bfloat16, fused head": ("bfloat16", "flex", False),
    "float32 weights": ("float32", "segment", False),
    "adapters": ("bfloat16", "segment", True),
}


def start(sharding: str, folder: Path) -> Launched:
    worker = ["tests/helpers/mixed_precision_worker.py", sharding, str(folder)]
    if sharding == "zero3":
        return launch(worker, processes=2)
    # What `accelerate launch` hands to its workers.
    given = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value).lower() for name, value in given.items()}
    environment |= {"FSDP_AUTO_WRAP_POLICY": given["fsdp_auto_wrap_policy"], "ACCELERATE_USE_FSDP": "true"}
    environment |= {"FSDP_STATE_DICT_TYPE": given["fsdp_state_dict_type"]}
    return launch(["tests/helpers/fsdp2_on_cpus.py", *worker], processes=2, **environment)


def main(sharding: str, folder: Path) -> None:
    # Uncompiled it is plain tensor code; PyTorch refuses gradients on CPUs because the compiled one has none there.
    flex_attention._validate_device = lambda *tensors: None
    zero3 = {}
    if sharding == "zero3":
        deepspeed.init_distributed()
        zero3 = {"deepspeed": json.loads((ROOT / "configs/deepspeed/zero3-cpu.json").read_text())}
    losses = {}
    for name, (dtype, kind, adapters) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa")
        if adapters:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer = make_trainer(
            folder / sharding / name,
            make_pairs(16, seed=6),
            model=model,
            attention=kind,
            bf16=True,
            max_steps=2,
            **zero3,
        )
        trainer.train()
        losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        del trainer, model
        gc.collect()
    if torch.distributed.get_rank() == 0:
        torch.save(losses, folder / f"{sharding}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
