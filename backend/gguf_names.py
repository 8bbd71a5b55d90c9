"""Names of text encoders' weights in GGUF files, where llama.cpp renames them, and in transformers. Denoisers keep their original names there."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_T5_ENDS = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
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
_T5_MARK = "enc.blk.0.attn_q.weight"
_T5_ARCHITECTURES = ("t5", "t5encoder")
_DECODER_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_BLOCK = {
    **_DECODER_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_DECODER_MARKS = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate.weight")
_GEMMA_MARK = "blk.0.post_ffw_norm.weight"
_PERMUTED_ARCHITECTURES = ("llama", "mistral3")
"""Their rows of queries and keys are in another order. No picture model that is read here uses them."""
_NAME = re.compile(r"(?:(?:enc\.)?blk\.(\d{1,3})\.)?([\w.]+)\.(weight|bias)")


def rename_llama_cpp(names: Collection[str], architecture: str) -> dict[str, str]:
    """The file's name -> transformers', for the names that differ; empty for a file that llama.cpp did not name."""
    if _T5_MARK in names or architecture in _T5_ARCHITECTURES:
        return _renamed(names, _T5_ENDS, "encoder.block.", _T5_BLOCK)
    if all(mark in names for mark in _DECODER_MARKS) and architecture not in _PERMUTED_ARCHITECTURES:
        return _renamed(names, _DECODER_ENDS, "model.layers.", _GEMMA_BLOCK if _GEMMA_MARK in names else _DECODER_BLOCK)
    return {}


def one_too_large(names: Collection[str]) -> frozenset[str]:
    """The file's names of weights to which llama.cpp adds 1: those of Gemma's norms, which transformers stores as differences to 1."""
    return frozenset(name for name in names if name.endswith("norm.weight")) if _GEMMA_MARK in names else frozenset()


def _renamed(names: Collection[str], ends: Mapping[str, str], blocks: str, block: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        number, layer, leaf = match.groups()
        renamed = ends.get(layer) if number is None else block.get(layer)
        if renamed is not None:
            whole = f"{renamed}.{leaf}" if number is None else f"{blocks}{number}.{renamed}.{leaf}"
            if whole not in names:
                found[name] = whole
    return found
