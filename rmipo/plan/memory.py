"""What a training step needs of each GPU. Estimates from shapes alone: a gated model can be planned for before it may be read.

Activations follow from which tensors autograd keeps (measured by tests/plan/test_memory.py).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from rmipo.errors import ConfigError
from rmipo.training.scoring import CHUNK

# Sizes as the model cards of the recipes' gated models, and of those made from them, state them.
SIZES_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA3_8B = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **SIZES_8B)
LLAMA3_70B = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **SIZES_70B)
MISTRAL_7B = MistralConfig(vocab_size=32000, num_key_value_heads=8, **SIZES_8B)
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA3_70B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B,
}


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Built in for the recipes' models, otherwise from the model's folder, the cache or the hub. Raises ConfigError."""
    if name in KNOWN:
        return KNOWN[name]
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model_name_or_path: {name} has no readable config.json ({reason})") from error


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `queries_and_keys`: (heads of queries + heads of keys) x head dimension."""

    parameters: int
    trained: int
    layers: int
    hidden: int
    queries_and_keys: int
    intermediate: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Parameters of the linear layers that quantization covers."""
        return self.layers * self.hidden * (2 * self.queries_and_keys + 3 * self.intermediate)

    @classmethod
    def of(cls, config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> "Shape":
        # Not by AutoModel: in a training process under ZeRO-3 that divides what it makes over the processes.
        with init_empty_weights(), no_init_weights():  # drawing random numbers into nothing takes most of the time
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            model.tie_weights()  # tied ones are one parameter
            parameters = model.num_parameters()
            if peft_config is not None:
                model = get_peft_model(model, peft_config)
        text = config.get_text_config()
        # Some, such as Gemma, state it; for others it follows.
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries_and_keys=(text.num_attention_heads + text.num_key_value_heads) * head_dim,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
        )


GIB = 2**30
# GB that a card is sold with -> GiB that CUDA reports of it; of several cards the least. Others: the number as GiB.
REPORTED_GIB = {24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 94: 93.1, 96: 94.5, 141: 139.8}
RESERVED_FRACTION = 0.06  # of the GPU: CUDA context, NCCL, fragmentation
RESERVE = "reserve (assumed)"
LIVE_PARAMETERS = 10**9  # that ZeRO-3 has gathered at once: DeepSpeed's stage3_max_live_parameters
FUSED_HEAD_TILE = (4096, 32768)  # logits that TRL's fused LM head has at once: tokens x entries of the vocabulary
NF4_BYTES = 0.5 + 4 / 64  # per weight: 4 bits, and a float32 scale for each block of 64

# Bytes on each of n GPUs per trained parameter: (weights, gradients and optimizer). Under DeepSpeed weights are in
# bfloat16, and the gradients (`grad_accum_dtype` of configs/deepspeed/; its default is bfloat16), master weights and
# Adam's two moments in float32; elsewhere the weights are the masters.
STATE_BYTES = {
    "zero3": lambda n: (2 / n, 16 / n),
    "zero2": lambda n: (2, 2 + 16 / n),  # a whole gradient in bfloat16 until it is reduced
    "fsdp2": lambda n: (4 / n, 12 / n),
    "none": lambda n: (4, 12),
}


@dataclass(frozen=True)
class Hardware:
    gpus: int  # of all nodes
    gib: float  # memory of one GPU, as CUDA reports it

    @classmethod
    def parse(cls, text: str, nodes: int = 1) -> "Hardware":
        """`8x80`: eight GPUs sold as 80 GB on each of `nodes`. Raises ConfigError for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*(?:\.\d+)?)", text)
        if match is None:
            raise ConfigError(f"GPUS={text}: expected <GPUs per node>x<GB of one>, e.g. GPUS=8x80")
        return cls(nodes * int(match[1]), REPORTED_GIB.get(float(match[2]), float(match[2])))

    @classmethod
    def here(cls) -> "Hardware | None":
        """The GPUs of this machine, None without any."""
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return cls(len(sizes), min(sizes) / GIB) if sizes else None  # the smallest one decides what fits


@dataclass(frozen=True)
class Sharding:
    """How model states are spread over GPUs: DeepSpeed ZeRO 2 or 3, FSDP2, or whole on each GPU ("none")."""

    kind: str
    offload: bool = False  # to host memory

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
        zero = config["zero_optimization"]
        return cls(f"zero{zero['stage']}", zero.get("offload_optimizer", {}).get("device") == "cpu")


@dataclass(frozen=True)
class Workload:
    """What of a recipe decides memory and time. `stage`: "preference" or "sft"."""

    stage: str
    longest: int  # tokens of the longest micro-batch that the recipe's limits allow
    global_batch: int
    packed_length: int | None  # SFT: dialogues are joined into sequences of so many tokens
    checkpoint_every: int  # each how-manyth layer is computed again in backward; 0: none
    weight_bytes: int  # of the loaded weights: 2 for bfloat16
    compute_bytes: int  # of a number in matrix products
    fused_head: bool  # TRL's LM head, which never holds all logits
    reference_logits: bool  # of a second model in memory
    scores_pairs: bool  # without gradient, by the initial policy
    scores_responses: bool  # without gradient, without their prompts or with others
    adapters: bool
    quantized: bool


def layer_activations(shape: Shape, tokens: int, compute_bytes: int) -> int:
    """Bytes that autograd keeps of one decoder layer, with a fused attention kernel.

    Per token: 4 h (two norms: normalised input, output) + 2 q (query, output) + 2 k (key, value) + 4 f (gated MLP) in
    the compute dtype; the two norms' inputs (2 h) in float32.
    """
    narrow = 4 * shape.hidden + 2 * shape.queries_and_keys + 4 * shape.intermediate
    return tokens * (compute_bytes * narrow + 8 * shape.hidden)


def head_activations(shape: Shape, work: Workload, scored: int) -> int:
    """Peak bytes of LM head and log-probabilities over `scored` positions.

    Fused: one tile of logits; in backward the gradients of the head's weight and input, summed in float32 and then cast.
    Else: all logits, overwritten by their gradient (`training.scoring`), and a chunk of them in float32; where the
    reference's are needed, those as well.
    """
    inputs = scored * shape.hidden
    head = 0 if work.adapters else shape.vocabulary * shape.hidden
    if work.fused_head:
        tile = min(FUSED_HEAD_TILE[0], scored) * FUSED_HEAD_TILE[1]
        return work.compute_bytes * (inputs + tile) + (4 + work.compute_bytes) * (inputs + head)
    logits = scored * shape.vocabulary
    both = logits * (1 + work.reference_logits)
    return work.compute_bytes * (inputs + both + head) + 8 * min(logits, CHUNK["cuda"])


def gradient_pass(shape: Shape, work: Workload, tokens: int) -> dict[str, int]:
    """Peak bytes of forward and backward over `tokens`, in parts."""
    layer, head = layer_activations(shape, tokens, work.compute_bytes), head_activations(shape, work, tokens)
    recomputed = math.ceil(shape.layers / work.checkpoint_every) if work.checkpoint_every else 0
    inputs = recomputed * tokens * shape.hidden * work.compute_bytes
    kept = (shape.layers - recomputed) * layer
    # Only one of the two is alive on top of these: the head, or the layer that is computed again.
    again = max(layer - head, 0) if recomputed else 0
    return {"activations": inputs + kept + again, "LM head": head}


def model_states(shape: Shape, work: Workload, sharding: Sharding, gpus: int) -> dict[str, int]:
    """Bytes on each of `gpus` of parameters, gradients and optimizer, and of weights that a forward gathers."""
    divided = gpus if sharding.kind in ("zero3", "fsdp2") else 1
    weights, rest = (0, 0) if sharding.offload else STATE_BYTES[sharding.kind](gpus)
    frozen = 0
    if work.adapters:
        quantized = shape.linear * work.quantized
        frozen = ((shape.parameters - quantized) * work.weight_bytes + quantized * NF4_BYTES) / divided
    parts = {"parameters": int(weights * shape.trained + frozen), "gradients and optimizer": int(rest * shape.trained)}
    if work.reference_logits and not work.adapters:
        parts["reference model"] = work.weight_bytes * shape.parameters // divided
    if divided > 1 or sharding.offload:
        parts["gathered parameters"] = 2 * min(LIVE_PARAMETERS, shape.parameters)
    return parts


def plan_memory(shape: Shape, work: Workload, sharding: Sharding, hardware: Hardware) -> dict[str, int]:
    """Bytes that the longest step needs of each GPU, in parts that add up."""
    states = model_states(shape, work, sharding, hardware.gpus)
    return states | gradient_pass(shape, work, work.longest) | {RESERVE: int(RESERVED_FRACTION * hardware.gib * GIB)}
