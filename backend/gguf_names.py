"""Names of text encoders' weights in GGUF files, where llama.cpp renames them, and in transformers. Denoisers keep their original names there."""

from __future__ import annotations

import re
from collections.abc import Collection

_T5_ENDS = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_T5_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_T5_NAME = re.compile(r"enc\.blk\.(\d{1,3})\.(\w+)\.weight")
_T5_MARK = "enc.blk.0.attn_q.weight"
_T5_ARCHITECTURES = ("t5", "t5encoder")


def rename_llama_cpp(names: Collection[str], architecture: str) -> dict[str, str]:
    """The file's name -> transformers', for the names that differ; empty for a file that llama.cpp did not name."""
    if _T5_MARK not in names and architecture not in _T5_ARCHITECTURES:
        return {}
    return {name: renamed for name in names if (renamed := _t5_name(name)) is not None and renamed not in names}


def _t5_name(name: str) -> str | None:
    if name in _T5_ENDS:
        return _T5_ENDS[name]
    match = _T5_NAME.fullmatch(name)
    layer = _T5_BLOCK.get(match[2]) if match is not None else None
    return f"encoder.block.{match[1]}.{layer}.weight" if match is not None and layer is not None else None
