"""Run a training script under FSDP2 on CPU processes: accelerate launch ... tests/helpers/fsdp2_on_cpus.py SCRIPT [arguments]

accelerate shards over GPUs and their like only. Here CPU processes, connected by gloo, count as such; all else is what
configs/accelerate/fsdp2.yaml starts on GPUs.
"""

import runpy
import sys

from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

connect, shard, backward = PartialState.__init__, Accelerator.prepare, Accelerator.backward
sharded = []


def connect_as_accelerators(self, *arguments, **keywords):
    connect(self, *arguments, **keywords)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def shard_and_say(self, *objects, **keywords):
    prepared = shard(self, *objects, **keywords)
    for model in prepared if isinstance(prepared, list) else [prepared]:
        if isinstance(model, FSDPModule) and self.is_main_process:
            shared = [p for p in model.parameters() if p.to_local().numel() < p.numel()]
            print(f"{self.num_processes} processes share {len(shared)} parameters")
            sharded.append(model)
    return prepared


def backward_and_say(self, loss, **keywords):
    """After the first micro-batch: a gradient that is not divided yet is kept whole, beside the parameter's own."""
    backward(self, loss, **keywords)
    while sharded:
        trained = [p for p in sharded.pop().parameters() if p.requires_grad]
        print(f"{sum(p.grad is not None for p in trained)} of {len(trained)} gradients are divided")


PartialState.__init__ = connect_as_accelerators
Accelerator.prepare, Accelerator.backward = shard_and_say, backward_and_say
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
