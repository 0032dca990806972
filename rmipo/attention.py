"""Attention over packed rows with shared prefixes: a position sees its group's prefix and its own branch, causally.

Three exact ways, chosen by `resolve_kind`:
    segment  one SDPA call per branch, registered with transformers as "rmipo_segment"; best on CPU
    flex     compiled flex_attention with a BlockMask; CUDA
    dense    SDPA with a boolean 4-D mask; the slow fallback that works everywhere
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from .errors import UserError
from .packing import PackedRow

# attention kind -> name of the transformers attention implementation that serves it
IMPLEMENTATIONS = {"segment": "rmipo_segment", "flex": "flex_attention", "dense": "sdpa"}


class ArchitectureError(UserError, ValueError):
    """Packed rows can't be scored exactly with a model of this kind."""


def resolve_kind(kind: str, device: torch.device) -> str:
    """`auto` -> the fastest exact kind on `device`; a named kind stays. Raises ValueError for an unknown one."""
    if kind == "auto":
        return "flex" if device.type == "cuda" else "segment"
    if kind not in IMPLEMENTATIONS:
        raise ValueError(f"attention: found {kind!r}, expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    return kind


def attach(model: PreTrainedModel, kind: str) -> None:
    """Switch `model` to the attention implementation that serves `kind` ("plain": ordinary unpacked rows).

    Raises ArchitectureError where the architecture has features that packed rows can't serve, naming them.
    """
    if kind != "plain":
        found = _unserved_features(model)
        if found:
            raise ArchitectureError(
                f"{type(model).__name__} can't run on packed preference rows: it has {' and '.join(found)}. "
                "Use a decoder with plain softmax attention (Llama, Mistral, Qwen2/3, Gemma 3, ...)."
            )
    model.set_attn_implementation("sdpa" if kind == "plain" else IMPLEMENTATIONS[kind])


def _unserved_features(model: PreTrainedModel) -> list[str]:
    """What would make scores of a packed row differ from those of its sequences; empty for a plain decoder."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    found = [
        f"{kind.replace('_', ' ')} layers" for kind in sorted(layer_types - {"full_attention", "sliding_attention"})
    ]
    if model._is_stateful and not found:
        found.append("recurrent layers")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found.append("soft-capped attention scores")
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        found.append("attention sinks")
    if config.is_encoder_decoder:
        found.append("an encoder")
    if not found and not model._supports_attention_backend:
        found.append("no pluggable attention")
    return found


def forward_kwargs(kind: str, row: PackedRow, config: PreTrainedConfig) -> dict:
    """The keyword arguments of the model's forward that make it attend within `row`'s segments."""
    assert config._attn_implementation == IMPLEMENTATIONS[kind], "attach(model, kind) comes first, or scores are wrong"
    if kind == "segment":
        return {"segments": row["segments"]}
    make_mask = _block_mask if kind == "flex" else dense_mask
    masks = {layer_type: make_mask(row, window) for layer_type, window in _windows(config.get_text_config()).items()}
    # Models that mix layer types take a mask for each; the others take the mask itself.
    return {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Sliding window of each type of layer that the model has; None stands for full attention."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return {"full_attention": None}
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in layer_types}


def _position_tables(row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Per position: its prefix's start, and its branch's start (-1 within a prefix). Both `(T,)`.

    Prefixes with the same start belong to the same group.
    """
    length = row["input_ids"].shape[1]
    group = torch.full((length,), -1, dtype=torch.long)
    branch = torch.full((length,), -1, dtype=torch.long)
    for prefix_start, prefix_length, start, n in row["segments"]:
        group[prefix_start : prefix_start + prefix_length] = prefix_start
        group[start : start + n] = prefix_start
        branch[start : start + n] = start
    device = row["input_ids"].device
    return group.to(device), branch.to(device)


def _mask_function(row: PackedRow, window: int | None):
    group, branch = _position_tables(row)
    position = row["position_ids"][0]

    def allowed(batch, head, query, key):
        same = (group[query] == group[key]) & ((branch[key] == -1) | (branch[query] == branch[key]))
        causal = query >= key
        if window is None:
            return same & causal
        return same & causal & (position[query] - position[key] < window)

    return allowed


def dense_mask(row: PackedRow, window: int | None) -> torch.Tensor:
    """Boolean `(1, 1, T, T)`, True where the query (dim 2) sees the key (dim 3)."""
    index = torch.arange(row["input_ids"].shape[1], device=row["input_ids"].device)
    return _mask_function(row, window)(0, 0, index[:, None], index[None, :])[None, None]


def _block_mask(row: PackedRow, window: int | None) -> BlockMask:
    length = row["input_ids"].shape[1]
    return create_block_mask(_mask_function(row, window), None, None, length, length, device=row["input_ids"].device)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: list[tuple[int, int, int, int]] | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row, branch by branch, with no mask larger than a branch.

    Args:
        query: `(1, heads, T, d)`; key, value: `(1, kv_heads, T, d)`.
        segments: as `packing.pack` returns them: they tile the row, each prefix directly before its first branch.

    Returns:
        Output `(1, T, heads, d)`.
    """
    assert segments is not None, "rmipo_segment serves packed rows only; attach(model, 'plain') for others"
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)

    # One split per tensor: its backward is one concatenation, where slices would each pad a full-length gradient.
    sizes = []
    for prefix_start, group in itertools.groupby(segments, key=lambda segment: segment[0]):
        branches = list(group)
        assert prefix_start + branches[0][1] == branches[0][2] and prefix_start == sum(sizes)
        sizes += [branches[0][1], *(branch[3] for branch in branches)]
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)

    outputs = []
    for _, group in itertools.groupby(segments, key=lambda segment: segment[0]):
        prefix = next(pieces)
        shared = prefix[0].shape[2]
        for number, (_, branch) in enumerate(zip(group, pieces, strict=False)):
            # The prefix's own rows are needed once per group. Running them again with each later branch, and dropping
            # them, lets every call be plainly causal, which is faster than a mask for a branch that sees a prefix.
            q, k, v = (torch.cat(parts, dim=2) for parts in zip(prefix, branch, strict=True)) if shared else branch
            out = _causal(q, k, v, scaling, dropout, sliding_window)
            outputs.append(out if number == 0 else out[:, :, shared:])
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal(q, k, v, scaling, dropout, window):
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
    index = torch.arange(length, device=q.device)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout)


AttentionInterface.register("rmipo_segment", segment_attention)
