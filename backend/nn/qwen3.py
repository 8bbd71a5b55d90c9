"""The layers of transformers' Qwen3 as a text encoder: token ids in, the residual stream after some of its layers out. Safe in half precision.

Residual streams of trained decoders overflow fp16, so in half precision the stream is fp32; in fp16 the products inside the MLPs are too. Layers
behind the last one read, and the last norm, do not run; they are kept so that a saved model is complete.

Shapes: B prompts, L tokens, D width, K head width, N layers that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from backend.nn.stream_layers import gated, half_rope, normed

THETA = 1_000_000.0
NORM_EPS = 1e-6
"""Of every published Qwen3 for text alone."""
VL_THETA = 5_000_000.0
"""Of Qwen3-VL, whose places in text alone count up as in other decoders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Shape:
    """A Qwen3's structure, derived from its shapes. `theta` is the base of its rotations, which no shape tells."""

    vocab_length: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int
    theta: float = THETA


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
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )
    config._attn_implementation = "sdpa"  # layers outside of a transformers model fall back to one without a causal mask
    return config


class Qwen3TextEncoder(nn.Module):
    """Token ids (B, L) in, the stream after each layer of `reads` side by side, (B, L, N * D), out. Names are those of transformers' Qwen3Model.

    `reads`: numbers of layers, counted from 1; by default the one before the last. `is_normed`: the last norm runs over the stream that is read.
    """

    def __init__(self, config: Qwen3Config, reads: Sequence[int] = (), is_normed: bool = False) -> None:
        super().__init__()
        self.is_normed = is_normed
        self.config = config
        self.reads = tuple(reads) or (config.num_hidden_layers - 1,)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`attention_mask` (B, L) is 0 for padding, which is behind the text and does not change its features."""
        embedded_BLD = self.embed_tokens(input_ids)
        dtype = embedded_BLD.dtype
        stream_BLD: Tensor = embedded_BLD.float() if dtype in (torch.float16, torch.bfloat16) else embedded_BLD
        rope = half_rope(input_ids.shape[1], self.config.head_dim, self.config.rope_parameters["rope_theta"], dtype, input_ids.device)
        mask = None if attention_mask is None else _readable(attention_mask)
        read = {0: stream_BLD}
        for number, layer in enumerate(self.layers[: max(self.reads)], 1):
            stream_BLD = run_decoder_layer(layer, stream_BLD, rope, dtype, mask)
            if number in self.reads:
                read[number] = stream_BLD
        found = torch.cat([read[number] for number in self.reads], dim=-1)
        return self.norm(found) if self.is_normed else found


def _readable(attention_mask_BL: Tensor) -> Tensor:
    """Which tokens each token reads, (B, 1, L, L): itself and those before it, but no padding."""
    length = attention_mask_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=attention_mask_BL.device).tril()
    return causal_LL & attention_mask_BL.bool()[:, None, None, :]


def run_decoder_layer(layer: Any, stream_BLD: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """The stream, in a dtype of its own, after a layer of transformers' Qwen2 or Qwen3 that computes in `dtype`."""
    mixed_BLD, _ = layer.self_attn(
        hidden_states=normed(layer.input_layernorm, stream_BLD, dtype), position_embeddings=rope, attention_mask=mask
    )  # fmt: skip
    stream_BLD = stream_BLD + mixed_BLD.to(stream_BLD.dtype)
    mlp = layer.mlp
    inner_BLD = gated(mlp.up_proj, mlp.gate_proj, mlp.down_proj, normed(layer.post_attention_layernorm, stream_BLD, dtype))
    return stream_BLD + inner_BLD.to(stream_BLD.dtype)
