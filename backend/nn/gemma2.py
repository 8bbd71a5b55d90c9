"""The layers of transformers' Gemma2 as a text encoder: token ids in, features of the layer before the last out. Safe in half precision.

In half precision the residual stream is fp32; in fp16 the products inside the MLPs are too. The last layer and the last norm do not run; they are
kept so that a saved model is complete.

Shapes: B prompts, L tokens, D width, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm

from backend.nn.stream_layers import gated, half_rope

THETA, NORM_EPS, SOFT_CAP = 10_000.0, 1e-6, 50.0
"""Of every published Gemma2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma2Shape:
    """A Gemma2's structure, derived from its shapes."""

    vocab_length: int
    width: int
    inner_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    num_layers: int


def gemma2_config(shape: Gemma2Shape) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=shape.vocab_length,
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_width,
        query_pre_attn_scalar=shape.head_width,
        num_hidden_layers=shape.num_layers,
        rms_norm_eps=NORM_EPS,
        attn_logit_softcapping=SOFT_CAP,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )


class Gemma2TextEncoder(nn.Module):
    """Token ids (B, L) in, features (B, L, D) out. Names are those of transformers' Gemma2Model."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Gemma2DecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.tokenizer_bytes: Tensor | None = None
        """The SentencePiece model from its file; no weight."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded_BLD = self.embed_tokens(input_ids)
        dtype = embedded_BLD.dtype
        stream_BLD: Tensor = embedded_BLD.float() * self.config.hidden_size**0.5
        rope = half_rope(input_ids.shape[1], self.config.head_dim, THETA, dtype, input_ids.device)
        for layer in self.layers[:-1]:
            stream_BLD = _run_layer(layer, stream_BLD, rope, dtype)
        return stream_BLD


def _run_layer(layer: Any, stream_BLD: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    mixed_BLD = _attend(layer.self_attn, layer.input_layernorm(stream_BLD).to(dtype), rope)
    stream_BLD = stream_BLD + layer.post_attention_layernorm(mixed_BLD.to(stream_BLD.dtype))
    mlp, normed_BLD = layer.mlp, layer.pre_feedforward_layernorm(stream_BLD).to(dtype)
    inner_BLD = gated(mlp.up_proj, mlp.gate_proj, mlp.down_proj, normed_BLD, activation=partial(functional.gelu, approximate="tanh"))
    return stream_BLD + layer.post_feedforward_layernorm(inner_BLD.to(stream_BLD.dtype))  # type: ignore[no-any-return]


def _attend(attention: Any, tokens_BLD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention whose scores are bounded, cap * tanh(score / cap). Gemma Team 2024, "Gemma 2", section 2.

    Texts are a few hundred tokens: all scores at once, in fp32. The window of every second layer is longer than any prompt.
    """
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (layer(tokens_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for layer in layers)
    query, key = _turn(query, rope), _turn(key, rope)
    repeats = attention.num_key_value_groups
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores_BNLL = (query @ key.transpose(-1, -2)).float() * attention.scaling
    scores_BNLL = SOFT_CAP * torch.tanh(scores_BNLL / SOFT_CAP)
    later_LL = torch.ones(scores_BNLL.shape[-2:], dtype=torch.bool, device=scores_BNLL.device).triu(1)
    weights_BNLL = scores_BNLL.masked_fill(later_LL, float("-inf")).softmax(dim=-1).to(value.dtype)
    return attention.o_proj((weights_BNLL @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _turn(x_BNLK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The first half of a head's numbers turned with the second. Su et al. 2021, "RoFormer", eq. 34."""
    cosines, sines = (part.unsqueeze(1) for part in rope)
    first, second = x_BNLK.chunk(2, dim=-1)
    return x_BNLK * cosines + torch.cat([-second, first], dim=-1) * sines
