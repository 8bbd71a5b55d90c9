"""Flux.2's network: diffusers' Flux2Transformer2DModel with the original names of its parts and MLPs that are safe in fp16, and its single blocks.

It is run by its program (backend/families/flux2/program.py). The streams of a network that computes in fp16 are fp32 (backend/nn/flux_layers.py).

Shapes: B rows, L tokens of text and picture, D token width, N heads, K head width, F inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from torch import Tensor
from torch.nn import functional

from backend.attention import attention_function
from backend.nn.flux import OriginalBlockNames
from backend.nn.flux_layers import Rope, norm_with
from backend.nn.stream_layers import project_product


class GatedFeedForward(Flux2FeedForward):  # type: ignore[misc]  # the library's classes are untyped
    """The MLP of a block with two streams."""

    def forward(self, x: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.linear_in(x).chunk(2, dim=-1)
        return project_product(self.linear_out, functional.silu(gate_BLF), up_BLF)


class IntegratedFlux2Transformer2DModel(OriginalBlockNames, Flux2Transformer2DModel):  # type: ignore[misc]
    """diffusers' Flux2Transformer2DModel with the original names of its parts."""

    @wraps(Flux2Transformer2DModel.__init__)  # type: ignore[misc]  # the signature that configurations are read by
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.ff.__class__ = block.ff_context.__class__ = GatedFeedForward


def run_single_block(
    block: Any, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, rope: Rope, mask: Tensor | None = None
) -> Tensor:
    """The tokens after a block with one stream whose shift, scale and gate (B, 1, D) are known. `dtype` is the network's."""
    shift, scale, gate = modulations
    attn = block.attn
    query, key, value, mlp = split_projection(attn, norm_with(block.norm, tokens_BLD, scale, shift, dtype))
    query, key = (apply_rotary_emb(heads, rope, sequence_dim=1) for heads in (query, key))
    mixed_BLD = attention_function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn.heads, mask, skip_reshape=True)
    return tokens_BLD + gate * join_projection(attn, mixed_BLD, mlp).to(tokens_BLD.dtype)


def split_projection(attn: Any, normed_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalized queries and keys and the values (B, L, N, K), and the MLP's gate and input (B, L, 2 F)."""
    width = attn.inner_dim
    query, key, value, mlp = attn.to_qkv_mlp_proj(normed_BLD).split([width, width, width, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in (query, key, value))
    return attn.norm_q(query), attn.norm_k(key), value, mlp


def join_projection(attn: Any, mixed_BLD: Tensor, mlp_BL2F: Tensor) -> Tensor:
    """The block's output (B, L, D), of attention and MLP together."""
    gate_BLF, up_BLF = mlp_BL2F.chunk(2, dim=-1)
    return project_product(attn.to_out, functional.silu(gate_BLF), up_BLF, before_BLD=mixed_BLD)
