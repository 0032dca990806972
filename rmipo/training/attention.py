"""Attention over packed sequences with shared prefixes: a position sees its group's prefix and its own branch, causally.

Three exact ways, chosen by `resolve_kind`:
    segment  one SDPA call per branch, registered with transformers as "rmipo_segment"; best on CPU
    flex     compiled flex_attention with a BlockMask, and TRL's fused LM head; CUDA
    dense    SDPA with a boolean 4-D mask; slow, and right everywhere
"""

import functools
import itertools
import weakref

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from trl.trainer.utils import add_fused_lm_head

from rmipo.errors import UserError
from rmipo.training.packing import PackedSequence, Segment

# Positions per block of a BlockMask; for flex, sequences are padded to a multiple of it.
BLOCK = 128
# attention kind -> name of the transformers attention implementation that serves it
IMPLEMENTATIONS = {"segment": "rmipo_segment", "flex": "rmipo_flex", "dense": "sdpa"}
# Models that TRL's fused LM head was added to; their forward is the old one unless called with `fused_lm_head=True`.
_with_fused_head: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


class ArchitectureError(UserError, ValueError):
    """Packed sequences can't be scored exactly with a model of this kind."""


def resolve_kind(kind: str, device: torch.device) -> str:
    """`auto` -> the fastest exact kind on `device`; a named kind stays."""
    if kind != "auto":
        return kind
    return "flex" if device.type == "cuda" else "segment"


def attach(model: PreTrainedModel | PeftModel, kind: str) -> None:
    """Switch `model` to the attention implementation that serves `kind` ("plain": ordinary sequences).

    Raises ArchitectureError where the architecture has features that packed sequences can't serve, naming them.
    """
    if kind != "plain" and (found := _unserved_features(model)):
        raise ArchitectureError(
            f"{type(model).__name__} can't run on packed pairs: it has {' and '.join(found)}. "
            "Use a decoder with plain softmax attention (Llama, Mistral, Qwen2/3, Gemma 3, ...)."
        )
    model.set_attn_implementation("sdpa" if kind == "plain" else IMPLEMENTATIONS[kind])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if kind == "flex" and base not in _with_fused_head:
        add_fused_lm_head(base)
        _with_fused_head.add(base)


def register_fused_head(model: PreTrainedModel | PeftModel) -> None:
    """Tell DeepSpeed, before the first forward, that a fused head reads the LM head's weight in the forward of the model.

    ZeRO-3 would find out after it has recorded in which order forwards gather parameters, and fail in the next one.
    """
    from deepspeed.runtime.zero import register_external_parameter  # seconds, and only sharded runs need it

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base in _with_fused_head:
        register_external_parameter(base, base.get_output_embeddings().weight)


def _unserved_features(model: PreTrainedModel) -> list[str]:
    """What would make packed scores differ from those of ordinary sequences; empty for a plain decoder."""
    config = model.config.get_text_config()
    layer_types = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    features = {
        "recurrent layers": model._is_stateful,
        "soft-capped attention scores": getattr(config, "attn_logit_softcapping", None) is not None,
        "attention sinks": any(name.endswith(".sinks") for name, _ in model.named_parameters()),
        "no pluggable attention": not model._supports_attention_backend,
    }
    return [*sorted(layer_types), *(feature for feature, found in features.items() if found)]


def kind_of(config: PreTrainedConfig) -> str:
    """The kind that a model of this configuration is attached to."""
    return next(kind for kind, name in IMPLEMENTATIONS.items() if name == config._attn_implementation)


def forward_inputs(packed: PackedSequence, config: PreTrainedConfig) -> dict:
    """The keyword arguments of the model's forward that lay out `packed` and make it attend within its segments."""
    kind = kind_of(config)
    packed = packed.padded(BLOCK) if kind == "flex" else packed
    # Positions restart in every group and branch; without them a branch would continue the one before.
    layout = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    if kind == "segment":
        return layout | {"segments": packed.segments}
    make_mask = block_mask if kind == "flex" else dense_mask
    masks = {layer_type: make_mask(packed, window) for layer_type, window in _windows(config.get_text_config()).items()}
    # Models that mix layer types take a mask for each; the others take the mask itself.
    return layout | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Sliding window of each type of layer that the model has; None stands for full attention."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in layer_types}


def _mask_function(packed: PackedSequence, window: int | None):
    groups, branches, position = packed.groups, packed.branches, packed.position_ids[0]

    def allowed(batch, head, query, key):
        same = (groups[query] == groups[key]) & ((branches[key] == -1) | (branches[query] == branches[key]))
        causal = query >= key
        if window is None:
            return same & causal
        return same & causal & (position[query] - position[key] < window)

    return allowed


def dense_mask(packed: PackedSequence, window: int | None) -> torch.Tensor:
    """Boolean `(1, 1, T, T)`, True where the query (dim 2) sees the key (dim 3)."""
    index = torch.arange(packed.length, device=packed.input_ids.device)
    return _mask_function(packed, window)(0, 0, index[:, None], index[None, :])[None, None]


def block_mask(packed: PackedSequence, window: int | None) -> BlockMask:
    """The same mask for flex_attention; T must be a multiple of BLOCK.

    Which blocks are empty is read off the ranges of groups and branches in each block, on their device: torch's own
    `create_block_mask` would lay out all T x T entries, and asking the device would stop the host.
    """
    groups, branches = (values.view(-1, BLOCK) for values in (packed.groups, packed.branches))
    index = torch.arange(len(groups), device=groups.device)
    meet = (index[:, None] >= index) & _ranges_meet(groups)
    meet &= (branches.amin(1) == -1) | _ranges_meet(branches)
    counts = meet.sum(1, dtype=torch.int32)[None, None]
    columns = meet.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=BLOCK, mask_mod=_mask_function(packed, window))


def _ranges_meet(values: torch.Tensor) -> torch.Tensor:
    """For `(blocks, BLOCK)` values: whether the ranges of two blocks overlap, `(blocks, blocks)`."""
    low, high = values.amin(1), values.amax(1)
    return (low[:, None] <= high) & (high[:, None] >= low)


@functools.cache
def _compiled_flex_attention():
    """Dynamic shapes: sequences of any length share one compilation each of the forward with and without gradients.

    Models with two kinds of masks (Gemma 3) need eight graphs, which is torch's limit; beyond it attention would run
    uncompiled, without a word and without memory for it. So there is room for more, and none left is an error.
    """
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=True)  # imports a compiler, which takes a second; GPUs alone need it


def packed_flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """flex_attention as transformers calls an attention: shapes as in `segment_attention`. Compiled on CUDA, no dropout."""
    shared = query.shape[1] // key.shape[1]
    grouped = shared & (shared - 1) == 0  # the kernel shares keys among a power of two of heads
    if not grouped:
        key, value = repeat_kv(key, shared), repeat_kv(value, shared)
    attend = _compiled_flex_attention() if query.device.type == "cuda" else flex_attention
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segments: tuple[Segment, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed sequence, branch by branch, with no mask larger than a branch, without dropout.

    Args:
        query: `(1, heads, T, d)`; key, value: `(1, kv_heads, T, d)`.
        segments: as `packing.pack` returns them: they tile the sequence, each prefix directly before its first branch.

    Returns:
        Output `(1, T, heads, d)`.
    """
    assert segments is not None, "rmipo_segment serves packed sequences only; attach(model, 'plain') for others"
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)  # Qwen2-MoE's layers keep theirs to themselves
    sharing = query.shape[1] // key.shape[1]  # heads that share a key
    key, value = repeat_kv(key, sharing), repeat_kv(value, sharing)

    # One split per tensor: its backward is one concatenation, where slices would each pad a full-length gradient.
    groups = [list(group) for _, group in itertools.groupby(segments, key=lambda segment: segment.prefix_start)]
    sizes = []
    for group in groups:
        first = group[0]
        assert first.prefix_start == sum(sizes) and first.start == first.prefix_start + first.prefix_length
        sizes += [first.prefix_length, *(branch.length for branch in group)]
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)

    outputs = []
    for group in groups:
        prefix = next(pieces)
        shared = prefix[0].shape[2]
        for number, (_, branch) in enumerate(zip(group, pieces, strict=False)):
            # The prefix's own outputs are needed once per group. Running them again with each later branch, and dropping
            # them, lets every call be plainly causal, which is faster than a mask for a branch that sees a prefix.
            q, k, v = (torch.cat(parts, dim=2) for parts in zip(prefix, branch, strict=True)) if shared else branch
            out = _causal(q, k, v, scaling, sliding_window)
            outputs.append(out if number == 0 else out[:, :, shared:])
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal(q, k, v, scaling, window):
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    index = torch.arange(length, device=q.device)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


AttentionInterface.register("rmipo_segment", segment_attention)
AttentionInterface.register("rmipo_flex", packed_flex_attention)
