"""What a run needs before it starts: GPU memory, arithmetic, disk. Estimates from shapes alone; nothing is loaded.

Activations follow from which tensors autograd keeps (measured by tests/plan/test_memory.py). What is assumed rather than
derived is a named constant here, and printed with the plan.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedConfig

from rmipo.errors import ConfigError
from rmipo.plan.shapes import empty_model
from rmipo.training.batching import HOISTED_MICRO_BATCHES
from rmipo.training.logprobs import CHUNK

GIB = 2**30

# Assumptions, printed with every plan.
RESERVED_FRACTION = 0.06  # of the GPU: CUDA context, NCCL, fragmentation
LIVE_PARAMETERS = 10**9  # that ZeRO-3 has gathered at once: DeepSpeed's stage3_max_live_parameters

FUSED_HEAD_TILE = (4096, 32768)  # logits that TRL's fused LM head has at once: tokens x entries of the vocabulary
NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}  # per weight; key: nested quantization

# Bytes on each of n GPUs per trained parameter: (weights, gradients and optimizer). Under DeepSpeed weights are in
# bfloat16, and the gradients (`grad_accum_dtype` of configs/deepspeed/; its default is bfloat16), master weights and
# Adam's two moments in float32; elsewhere the weights are the masters.
STATE_BYTES = {
    "zero3": lambda n: (2 / n, 16 / n),
    "zero2": lambda n: (2, 2 + 16 / n),  # a whole gradient in bfloat16 until it is reduced
    "fsdp2": lambda n: (4 / n, 12 / n),
    "none": lambda n: (4, 12),
}
OFFLOADED_BYTES = (
    27  # per trained parameter, over all nodes: the same 18 in pinned buffers (DeepSpeed's estimator: x 1.5)
)


@dataclass(frozen=True)
class Hardware:
    nodes: int
    gpus_per_node: int
    gib: float  # memory of one GPU
    host_gib: float | None = None  # memory of one machine, where it is known
    capability: tuple[int, int] | None = None  # CUDA's, of the oldest GPU, where it is known

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @classmethod
    def parse(cls, text: str, nodes: int = 1) -> "Hardware":
        """`8x80`: eight GPUs of 80 GiB on each of `nodes`. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
        if match is None or nodes < 1 or not int(match[1]) or not float(match[2]):
            raise ConfigError(
                f"GPUS={text}: expected <GPUs per node>x<GiB of one>, e.g. GPUS=8x80, and NODES of 1 or more"
            )
        return cls(nodes, int(match[1]), float(match[2]))


@dataclass(frozen=True)
class Sharding:
    """How model states are spread over GPUs: DeepSpeed ZeRO 2 or 3, FSDP2, or whole on each GPU ("none")."""

    kind: str
    offload: bool = False  # to host memory

    @property
    def divides_weights(self) -> bool:
        return self.kind in ("zero3", "fsdp2")

    @classmethod
    def load(cls, path: str | Path) -> "Sharding":
        """Read a launch configuration of configs/accelerate/."""
        config = yaml.safe_load(Path(path).read_text())
        if config["distributed_type"] != "DEEPSPEED":
            return cls({"FSDP": "fsdp2", "MULTI_GPU": "none"}[config["distributed_type"]])
        file = Path(path).parents[2] / config["deepspeed_config"]["deepspeed_config_file"]
        return cls.of_deepspeed(json.loads(file.read_text()))

    @classmethod
    def of_deepspeed(cls, config: dict) -> "Sharding":
        """What a DeepSpeed configuration says."""
        zero = config["zero_optimization"]
        return cls(f"zero{zero['stage']}", zero.get("offload_optimizer", {}).get("device") == "cpu")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `heads_width`, `kv_width`: heads x head dimension, of queries and of keys."""

    parameters: int
    trained: int
    linear: int  # parameters of the linear layers that quantization covers
    largest_layer: int
    body: int  # parameters without embeddings and head: each costs a multiply-add per token
    layers: int
    hidden: int
    heads: int
    heads_width: int
    kv_width: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> "Shape":
        model = empty_model(config)
        model.tie_weights()
        head = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) not in head]
        parameters = sum(p.numel() for p in model.parameters())
        largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
        body = sum(p.numel() for p in model.parameters() if id(p) not in head)
        trained = parameters
        if peft_config is not None:
            with init_empty_weights():
                trained = sum(p.numel() for p in get_peft_model(model, peft_config).parameters() if p.requires_grad)
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            trained=trained,
            linear=sum(weight.numel() for weight in linears),
            largest_layer=largest,
            body=body,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            heads_width=text.num_attention_heads * head_dim,
            kv_width=text.num_key_value_heads * head_dim,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
        )


@dataclass(frozen=True)
class Run:
    """What of a recipe decides memory and time. `stage`: "preference" or "sft"."""

    stage: str
    micro_batch: int
    evaluation_batch: int
    global_batch: int
    max_length: int
    max_tokens: int | None
    checkpoint_every: int  # each how-manyth layer is computed again in backward; 0: none
    packing: bool  # SFT: dialogues joined into sequences of max_length
    weight_bytes: int  # of the loaded weights: 2 for bfloat16
    autocast: bool  # weights in float32, matrix products in bfloat16
    fused_head: bool  # TRL's LM head, which never holds all logits
    prior: bool
    reference: str  # "none", "cached" log-probs, their "cached prior" alone, or "logits": a second model in memory
    adapters: bool
    quantized: bool
    nested_quantization: bool

    @property
    def compute_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes

    def full_length(self, size: int) -> int:
        """Tokens of `size` pairs (SFT: dialogues) as long as the recipe allows; all may pass through the LM head."""
        # A pair is longest with a short prompt and two responses that are cut at max_length.
        return size * self.max_length * (1 if self.stage == "sft" else 2)

    @property
    def longest_micro_batch(self) -> int:
        """Tokens of the longest micro-batch that the recipe's limits allow."""
        if self.max_tokens is None:
            return self.full_length(self.micro_batch)
        return max(self.max_tokens, self.full_length(1))


def layer_activations(shape: Shape, tokens: int, compute_bytes: int) -> int:
    """Bytes that autograd keeps of one decoder layer, with a fused attention kernel.

    Per token: 4 h (two norms: normalised input, output) + 2 q (query, output) + 2 k (key, value) + 4 f (gated MLP) in
    the compute dtype; the two norms' inputs (2 h), the softmax sums (one per head) and the norms' scales in float32.
    """
    narrow = 4 * shape.hidden + 2 * shape.heads_width + 2 * shape.kv_width + 4 * shape.intermediate
    wide = 2 * shape.hidden + shape.heads + 2
    return tokens * (compute_bytes * narrow + 4 * wide)


def head_activations(shape: Shape, run: Run, scored: int, gradient: bool = True) -> int:
    """Peak bytes of LM head and log-probabilities over `scored` positions.

    Fused: one tile of logits; in backward the gradients of the head's weight and input, summed in float32 and then cast.
    Else: all logits, overwritten by their gradient (`training.logprobs`), and a chunk of them in float32; where the
    reference's are needed, those as well.
    """
    inputs = scored * shape.hidden * run.compute_bytes
    head = shape.vocabulary * shape.hidden * (gradient and not run.adapters)
    if run.fused_head:
        tile = min(FUSED_HEAD_TILE[0], scored) * FUSED_HEAD_TILE[1] * run.compute_bytes
        if not gradient:
            return inputs + tile
        cast = (inputs + head * run.compute_bytes) * (run.compute_bytes < 4)
        return inputs + tile + 4 * (scored * shape.hidden + head) + cast
    logits = scored * shape.vocabulary
    copies = 2 if run.reference == "logits" else 1
    return inputs + copies * logits * run.compute_bytes + 8 * min(logits, CHUNK["cuda"]) + head * run.compute_bytes


def gradient_pass(shape: Shape, run: Run, tokens: int) -> dict[str, int]:
    """Peak bytes of forward and backward over `tokens`, in parts."""
    layer, head = layer_activations(shape, tokens, run.compute_bytes), head_activations(shape, run, tokens)
    recomputed = math.ceil(shape.layers / run.checkpoint_every) if run.checkpoint_every else 0
    inputs = recomputed * tokens * shape.hidden * run.compute_bytes
    kept = (shape.layers - recomputed) * layer
    # Only one of the two is alive on top of these: the head, or the layer that is computed again.
    again = max(layer - head, 0) if recomputed else 0
    return {"activations": inputs + kept + again, "LM head": head}


def no_gradient_pass(shape: Shape, run: Run, tokens: int) -> int:
    """Peak bytes of scoring `tokens` without gradient."""
    layer = tokens * run.compute_bytes * (2 * shape.hidden + 3 * shape.intermediate)
    return max(layer, head_activations(shape, run, tokens, gradient=False))


def model_states(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> dict[str, int]:
    """Bytes per GPU of parameters, gradients and optimizer, and of weights that a forward gathers."""
    divided = hardware.gpus if sharding.divides_weights else 1
    weights, rest = (0, 0) if sharding.offload else STATE_BYTES[sharding.kind](hardware.gpus)
    frozen = 0
    if run.adapters:
        other = shape.parameters - shape.linear * run.quantized
        frozen = (
            other * run.weight_bytes + shape.linear * run.quantized * NF4_BYTES[run.nested_quantization]
        ) / divided
    parts = {"parameters": int(weights * shape.trained + frozen), "gradients and optimizer": int(rest * shape.trained)}
    if run.reference == "logits" and not run.adapters:
        parts["reference model"] = 2 * shape.parameters // divided
    if divided > 1 or sharding.offload:
        parts["gathered parameters"] = 2 * min(LIVE_PARAMETERS, shape.parameters)
    return parts


def offloaded_bytes(shape: Shape, sharding: Sharding, hardware: Hardware) -> int:
    """Bytes of model states in each node's memory."""
    return OFFLOADED_BYTES * shape.trained // hardware.nodes if sharding.offload else 0


@dataclass(frozen=True)
class MemoryPlan:
    parts: dict[str, int]  # bytes per GPU; they add up to `needed`
    prior: int  # bytes of the prior pass, which is over before activations and head logits exist; 0 without one
    evaluation: int  # bytes of an evaluation batch, likewise in place of them
    host: int  # bytes per node of offloaded states
    capacity: int
    host_capacity: int | None  # None: not known

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity and (self.host_capacity is None or self.host <= self.host_capacity)

    @property
    def impossible(self) -> bool:
        """Weights and optimizer states alone exceed the memory: that is certain, where the rest is an estimate."""
        certain = self.parts["parameters"] + self.parts.get("gradients and optimizer", 0)
        return certain > self.capacity


def plan_memory(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> MemoryPlan:
    longest = run.longest_micro_batch
    step = gradient_pass(shape, run, longest)
    accumulated = math.ceil(run.global_batch * run.full_length(1) / (hardware.gpus * longest))
    prior = no_gradient_pass(shape, run, min(accumulated, HOISTED_MICRO_BATCHES) * longest) if run.prior else 0
    evaluation = no_gradient_pass(shape, run, run.full_length(run.evaluation_batch))
    capacity = int(hardware.gib * GIB)
    parts = model_states(shape, run, sharding, hardware) | step
    parts["prior or evaluation beyond these"] = max(max(prior, evaluation) - sum(step.values()), 0)
    parts["reserve (assumed)"] = int(RESERVED_FRACTION * capacity)
    host_capacity = None if hardware.host_gib is None else int(hardware.host_gib * GIB)
    host = offloaded_bytes(shape, sharding, hardware)
    parts = {name: size for name, size in parts.items() if size or name == "parameters"}
    return MemoryPlan(parts, prior, evaluation, host, capacity, host_capacity)


def largest_micro_batch(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> int | None:
    """The largest micro-batch that fits, in pairs of full length; None: not even one.

    Where micro-batches are counted by pairs, it divides each GPU's share of the global batch.
    """
    share = run.global_batch // hardware.gpus
    for size in range(share, 0, -1):
        candidate = dataclasses.replace(run, micro_batch=size, max_tokens=None)
        if (run.max_tokens or share % size == 0) and plan_memory(shape, candidate, sharding, hardware).fits:
            return size
    return None


def checkpoint_bytes(shape: Shape, run: Run, sharding: Sharding, only_model: bool) -> int:
    """One checkpoint: weights as saved, and for resuming the float32 masters and Adam's moments of what is trained."""
    weights = 4 * shape.trained if run.adapters else run.weight_bytes * shape.parameters
    if sharding.kind == "fsdp2" and not run.adapters:  # which saves its float32 masters as the model
        weights = 4 * shape.parameters
    if only_model:
        return weights
    sharded = sharding.kind != "none" or run.adapters
    return weights + shape.trained * (12 if sharded else 2 * run.weight_bytes)
