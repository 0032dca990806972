"""A llama of one layer as a GGUF file, its matrices in blocks of 8 bits."""

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

TOKENS = ["<|endoftext|>", "a", "b", "ab", "c"]
TEMPLATE = "{{ messages[0].content }}"
SHAPES = {
    "token_embd": (5, 32),
    "output_norm": (32,),
    "output": (5, 32),
    "blk.0.attn_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (32, 32),
    "blk.0.ffn_up": (32, 32),
    "blk.0.ffn_down": (32, 32),
}


def save_gguf(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by their GGUF names, as they were before they were put into blocks."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(1)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(TOKENS)
    file.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 4)
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(0)
    file.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    blocks = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors.items():
        if values.ndim == 2:
            file.add_tensor(f"{name}.weight", quantize(values, blocks), raw_dtype=blocks)
        else:
            file.add_tensor(f"{name}.weight", values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return tensors
