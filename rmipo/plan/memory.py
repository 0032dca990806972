"""What a run needs before it starts: GPU memory, arithmetic, disk. Estimates from shapes alone; nothing is loaded.

Model states come from DeepSpeed's own estimators. Activations follow from which tensors autograd keeps (measured by
tests/test_plan.py). What is assumed rather than derived is a named constant here, and printed with the plan.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would choose it too, with a warning
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import PeftConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from rmipo.errors import ConfigError
from rmipo.training.batching import HOISTED_MICRO_BATCHES
from rmipo.training.logprobs import CHUNK

GIB = 2**30

# Assumptions, printed with every plan.
RESERVED_FRACTION = 0.06  # of the GPU: CUDA context, NCCL, fragmentation
BUCKETS_GIB = 3.0  # DeepSpeed's or FSDP's communication buffers at their default sizes
A100_TFLOPS = 312.0  # bfloat16 without sparsity; the A800 likewise
MFU = 0.35  # model FLOPs per second over the GPU's peak, recomputation not counted as useful
TYPICAL_PROMPT, TYPICAL_RESPONSE = 220, 320  # tokens, UltraFeedback-like; sets the expected hours, never the fit
TYPICAL_DIALOGUE = 1_100  # tokens, UltraChat-like

ADAM_FP32_BYTES = 16  # per trained parameter: float32 weight, gradient and Adam's two moments
NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}  # per weight; key: nested quantization


@dataclass(frozen=True)
class Hardware:
    nodes: int
    gpus_per_node: int
    gib: float  # memory of one GPU
    host_gib: float | None = None  # memory of one machine, where it is known

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
    offload_optimizer: bool = False
    offload_parameters: bool = False

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
        offloaded = [zero.get(f"offload_{what}", {}).get("device") == "cpu" for what in ("optimizer", "param")]
        return cls(f"zero{zero['stage']}", *offloaded)


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
        with init_empty_weights():
            # Not by AutoModel: in a training process under ZeRO-3 that divides what it makes over the ranks.
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            head = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
            linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m.weight) not in head]
            parameters = sum(p.numel() for p in model.parameters())
            largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
            body = sum(p.numel() for p in model.parameters() if id(p) not in head)
            trained = parameters
            if peft_config is not None:
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
    checkpointing: bool
    packing: bool  # SFT: dialogues joined into rows of max_length
    weight_bytes: int  # of the loaded weights: 2 for bfloat16
    autocast: bool  # weights in float32, matrix products in bfloat16
    prior: bool
    reference_model: bool
    adapters: bool
    quantized: bool
    nested_quantization: bool

    @property
    def compute_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes

    def longest_row(self, size: int) -> int:
        """Tokens of the longest micro-batch that the recipe's limits allow; all may pass through the LM head."""
        if self.max_tokens is not None:
            return max(self.max_tokens, self.full_length(1))
        return self.full_length(size)

    def longest_evaluation_row(self) -> int:
        return self.full_length(self.evaluation_batch)

    def full_length(self, size: int) -> int:
        """Tokens of `size` pairs (SFT: dialogues) as long as the recipe allows."""
        # A pair is longest with a short prompt and two responses that are cut at max_length.
        return size * self.max_length * (1 if self.stage == "sft" else 2)


def layer_activations(shape: Shape, tokens: int, compute_bytes: int) -> int:
    """Bytes that autograd keeps of one decoder layer, with a fused attention kernel.

    Per token: 4 h (two norms: normalised input, output) + 2 q (query, output) + 2 k (key, value) + 4 f (gated MLP) in
    the compute dtype; the two norms' inputs (2 h), the softmax sums (one per head) and the norms' scales in float32.
    """
    narrow = 4 * shape.hidden + 2 * shape.heads_width + 2 * shape.kv_width + 4 * shape.intermediate
    wide = 2 * shape.hidden + shape.heads + 2
    return tokens * (compute_bytes * narrow + 4 * wide)


def head_activations(shape: Shape, run: Run, scored: int) -> int:
    """Peak bytes of LM head and cross-entropy.

    Preference: the logits, overwritten by their gradient (`training.logprobs`), and a chunk of them in float32. SFT: also, in
    float32, their copy and log-softmax (or its gradient).
    """
    hidden = scored * shape.hidden * run.compute_bytes
    logits = scored * shape.vocabulary
    if run.stage == "sft":
        return hidden + logits * (run.compute_bytes + 8)
    return hidden + logits * run.compute_bytes + 8 * min(logits, CHUNK["cuda"])


def gradient_pass(shape: Shape, run: Run) -> dict[str, int]:
    """Peak bytes of forward and backward over the longest row, in parts."""
    tokens = run.longest_row(run.micro_batch)
    layer = layer_activations(shape, tokens, run.compute_bytes)
    head = head_activations(shape, run, tokens)
    if not run.checkpointing:
        return {"activations": shape.layers * layer, "head logits": head}
    # Only one of the two is alive on top of the layers' inputs: the head, or the layer that is computed again.
    inputs = shape.layers * tokens * shape.hidden * run.compute_bytes
    return {"activations": inputs + max(layer - head, 0), "head logits": head}


def no_gradient_pass(shape: Shape, run: Run, tokens: int) -> int:
    """Peak bytes of scoring a row of `tokens` without gradient."""
    layer = tokens * run.compute_bytes * (2 * shape.hidden + 3 * shape.intermediate)
    return max(layer, head_activations(shape, run, tokens))


def model_states(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> dict[str, int]:
    """Bytes per GPU of parameters, gradients and optimizer; the key "host" is memory of the node."""
    layout = {"num_gpus_per_node": hardware.gpus_per_node, "num_nodes": hardware.nodes}
    frozen = _frozen_bytes(shape, run) if run.adapters else 0
    shards = 1 if sharding.kind in ("none", "zero2") else hardware.gpus
    gathered = 0 if shards == 1 else shape.largest_layer * 4
    trained = shape.trained
    host = 0
    if sharding.kind == "zero3":
        host, total, gathered = estimate_zero3_model_states_mem_needs(
            trained,
            shape.largest_layer,
            cpu_offload=sharding.offload_optimizer,
            cpu_offload_params=sharding.offload_parameters,
            **layout,
        )
        weights = 0 if sharding.offload_parameters else 2 * trained // hardware.gpus
        rest = total - gathered - weights
    elif sharding.kind == "zero2":
        host, total = estimate_zero2_model_states_mem_needs(trained, cpu_offload=sharding.offload_optimizer, **layout)
        weights, rest = 2 * trained, total - 2 * trained
    elif sharding.kind == "fsdp2" or run.adapters:  # float32 masters of what is trained
        weights, rest = 4 * trained // shards, (ADAM_FP32_BYTES - 4) * trained // shards
    else:
        weights, rest = run.weight_bytes * trained, 3 * run.weight_bytes * trained
    parts = {"parameters": weights + frozen // shards, "gradients and optimizer": rest, "gathered layer": gathered}
    if run.reference_model:
        parts["reference model"] = 2 * shape.parameters // shards
    return parts | {"host": host if sharding.offload_optimizer or sharding.offload_parameters else 0}


def _frozen_bytes(shape: Shape, run: Run) -> int:
    if not run.quantized:
        return shape.parameters * run.weight_bytes
    other = shape.parameters - shape.linear
    return int(shape.linear * NF4_BYTES[run.nested_quantization]) + other * run.weight_bytes


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
        return self.needed <= self.capacity and self.host_fits

    @property
    def host_fits(self) -> bool:
        return self.host_capacity is None or self.host <= self.host_capacity


def plan_memory(shape: Shape, run: Run, sharding: Sharding, hardware: Hardware) -> MemoryPlan:
    parts = model_states(shape, run, sharding, hardware)
    host = parts.pop("host")
    step = gradient_pass(shape, run)
    longest = run.longest_row(run.micro_batch)
    accumulated = math.ceil(run.global_batch * run.full_length(1) / (hardware.gpus * longest))
    prior_row = min(accumulated, HOISTED_MICRO_BATCHES) * longest
    prior = no_gradient_pass(shape, run, prior_row) if run.prior else 0
    evaluation = no_gradient_pass(shape, run, run.longest_evaluation_row())
    beyond = max(prior, evaluation) - sum(step.values())
    capacity = int(hardware.gib * GIB)
    parts |= step | {"prior or evaluation beyond these": max(beyond, 0)}
    parts["communication buffers (assumed)"] = int(BUCKETS_GIB * GIB) if hardware.gpus > 1 else 0
    parts["reserve (assumed)"] = int(RESERVED_FRACTION * capacity)
    parts = {name: size for name, size in parts.items() if size}
    host_capacity = None if hardware.host_gib is None else int(hardware.host_gib * GIB)
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


def typical_tokens(run: Run) -> tuple[int, int]:
    """(tokens with gradient, tokens through the LM head) of one example of typical lengths."""
    if run.stage == "sft":
        return TYPICAL_DIALOGUE, TYPICAL_DIALOGUE
    return TYPICAL_PROMPT + 2 * TYPICAL_RESPONSE, 2 * TYPICAL_RESPONSE


def flops_per_example(shape: Shape, run: Run) -> float:
    """Model FLOPs (recomputation left out) of one pair, or SFT dialogue, of typical lengths.

    6 per weight and token with gradients (4 where the weights are frozen), 2 without; causal attention adds
    6 q per layer, token and token of the sequence.
    """
    tokens, scored = typical_tokens(run)
    sequence = tokens if run.stage == "sft" else TYPICAL_PROMPT + TYPICAL_RESPONSE
    head = shape.vocabulary * shape.hidden
    total = (4 if run.adapters else 6) * (shape.body * tokens + head * scored)
    total += 6 * shape.layers * shape.heads_width * sequence * tokens
    if run.prior:
        total += 2 * (shape.body + head) * scored + 2 * shape.layers * shape.heads_width * TYPICAL_RESPONSE * scored
    return float(total)


def hours(shape: Shape, run: Run, hardware: Hardware, examples: float, peak_tflops: float) -> float:
    """Expected hours of training steps on `examples`, at MFU of the GPUs' peak."""
    return examples * flops_per_example(shape, run) / (hardware.gpus * peak_tflops * 1e12 * MFU) / 3600


def checkpoint_bytes(shape: Shape, run: Run, sharding: Sharding, only_model: bool) -> int:
    """One checkpoint: weights as saved, and for resuming the float32 masters and Adam's moments of what is trained."""
    weights = 4 * shape.trained if run.adapters else run.weight_bytes * shape.parameters
    if sharding.kind == "fsdp2" and not run.adapters:  # which saves its float32 masters as the model
        weights = 4 * shape.parameters
    if only_model:
        return weights
    sharded = sharding.kind != "none" or run.adapters
    return weights + shape.trained * (12 if sharded else 2 * run.weight_bytes)
