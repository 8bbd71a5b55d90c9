"""The layers of transformers' Qwen3 as a text encoder: token ids in, features of the layer before the last out. Safe in half precision.

Residual streams of trained decoders overflow fp16, so in half precision the stream is fp32; in fp16 the products inside the MLPs are too. The last
layer and the last norm do not run; they are kept so that a saved model is complete.

Shapes: B prompts, L tokens, D width, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from backend.nn.stream_layers import gated, half_rope, normed

THETA = 1_000_000.0
NORM_EPS = 1e-6
"""Of every published Qwen3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Shape:
    """A Qwen3's structure, derived from its shapes."""

    vocab_length: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int


def qwen3_config(shape: Qwen3Shape) -> Qwen3Config:
    config = Qwen3Config(
        vocab_size=shape.vocab_length,
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_width,
        num_hidden_layers=shape.num_layers,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    config._attn_implementation = "sdpa"  # layers outside of a transformers model fall back to one without a causal mask
    return config


class Qwen3TextEncoder(nn.Module):
    """Token ids (B, L) in, features (B, L, D) out. Names are those of transformers' Qwen3Model."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded_BLD = self.embed_tokens(input_ids)
        dtype = embedded_BLD.dtype
        stream_BLD: Tensor = embedded_BLD.float() if dtype in (torch.float16, torch.bfloat16) else embedded_BLD
        rope = half_rope(input_ids.shape[1], self.config.head_dim, THETA, dtype, input_ids.device)
        for layer in self.layers[:-1]:
            stream_BLD = _run_layer(layer, stream_BLD, rope, dtype)
        return stream_BLD


def _run_layer(layer: Any, stream_BLD: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    mixed_BLD, _ = layer.self_attn(
        hidden_states=normed(layer.input_layernorm, stream_BLD, dtype), position_embeddings=rope, attention_mask=None
    )  # fmt: skip
    stream_BLD = stream_BLD + mixed_BLD.to(stream_BLD.dtype)
    mlp = layer.mlp
    inner_BLD = gated(mlp.up_proj, mlp.gate_proj, mlp.down_proj, normed(layer.post_attention_layernorm, stream_BLD, dtype))
    return stream_BLD + inner_BLD.to(stream_BLD.dtype)
