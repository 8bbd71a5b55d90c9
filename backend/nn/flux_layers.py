"""Runs Flux.1's blocks with diffusers' modules: their own forward, or the same with a residual stream in fp32.

The streams of a trained Flux overflow fp16. If the network computes in fp16, streams, modulations and norms are therefore fp32, and only the inputs
of matrices and attention are fp16. The modulation's dtype tells the network's; the stream may have another.

Shapes: B rows, L tokens of text and picture, T text tokens, D token width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import attention_function

CELL = 2
TIME_SCALE = 1000.0
"""Times (0..1) and guidance are multiplied by this before their sinusoids."""
DEFAULT_GUIDANCE = 3.5
Rope = tuple[Tensor, Tensor]
"""Cosines and sines (L, K), fp32."""


class FluxAttentionProcessor:
    """A block's attention over the joined tokens, text before picture, with the chosen implementation (`backend.attention`)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query_BLNK, key_BLNK, value_BLNK = _project(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        num_text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if encoder_hidden_states is not None:
            layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            text = _project(attn, encoder_hidden_states, layers, norms)
            query_BLNK, key_BLNK, value_BLNK = (torch.cat(pair, dim=1) for pair in zip(text, (query_BLNK, key_BLNK, value_BLNK)))
        if image_rotary_emb is not None:
            query_BLNK = apply_rotary_emb(query_BLNK, image_rotary_emb, sequence_dim=1)
            key_BLNK = apply_rotary_emb(key_BLNK, image_rotary_emb, sequence_dim=1)
        query_BNLK, key_BNLK, value_BNLK = query_BLNK.transpose(1, 2), key_BLNK.transpose(1, 2), value_BLNK.transpose(1, 2)
        mixed_BLD = attention_function(query_BNLK, key_BNLK, value_BNLK, attn.heads, attention_mask, skip_reshape=True)
        if encoder_hidden_states is None:
            return mixed_BLD
        image_BLD = attn.to_out[1](attn.to_out[0](mixed_BLD[:, num_text:].contiguous()))
        return image_BLD, attn.to_add_out(mixed_BLD[:, :num_text].contiguous())


def _project(attn: Any, tokens_BLD: Tensor, layers: tuple[nn.Module, ...], norms: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalized per head, and values."""
    query_BLNK, key_BLNK, value_BLNK = (layer(tokens_BLD).unflatten(-1, (attn.heads, -1)) for layer in layers)
    return norms[0](query_BLNK), norms[1](key_BLNK), value_BLNK


def run_double_block(block: Any, image_BLD: Tensor, text_BTD: Tensor, modulation_BD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """(picture, text) after a block with two streams."""
    if image_BLD.dtype == modulation_BD.dtype:
        text_BTD, image_BLD = FluxTransformerBlock.forward(
            block, hidden_states=image_BLD, encoder_hidden_states=text_BTD, temb=modulation_BD, image_rotary_emb=rope
        )
        return image_BLD, text_BTD
    image_mods, text_mods = (_modulate(norm, modulation_BD, 6) for norm in (block.norm1, block.norm1_context))
    return run_double_with(block, image_BLD, text_BTD, (image_mods, text_mods), modulation_BD.dtype, rope)


def run_double_with(
    block: Any,
    image_BLD: Tensor,
    text_BTD: Tensor,
    modulations: tuple[Sequence[Tensor], Sequence[Tensor]],
    dtype: torch.dtype,
    rope: Rope,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(picture, text) after a block with two streams whose six shifts, scales and gates are known, for the picture and for the text.

    They have the streams' dtype; `dtype` is the network's. `mask` tells which keys count.
    """
    norms = (bare(block.norm1), bare(block.norm1_context)), (block.norm2, block.norm2_context)
    return run_two_streams(block.attn, (image_BLD, text_BTD), modulations, norms, (block.ff, block.ff_context), dtype, rope, mask)


def run_two_streams(
    attention: Any,
    streams: tuple[Tensor, Tensor],
    modulations: tuple[Sequence[Tensor], Sequence[Tensor]],
    norms: tuple[tuple[Any, Any], tuple[Any, Any]],
    feed_forwards: tuple[Any, Any],
    dtype: torch.dtype,
    rope: Rope,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(picture, text) after joint attention and an MLP each, with six shifts, scales and gates for either, as `run_double_with` takes them.

    `norms`: those before attention, and those before the MLPs; all without weights. In each pair the picture's comes first.
    """
    image_BLD, text_BTD = streams
    image_mods, text_mods = modulations
    attended = attention(
        hidden_states=norm_with(norms[0][0], image_BLD, image_mods[1], image_mods[0], dtype),
        encoder_hidden_states=norm_with(norms[0][1], text_BTD, text_mods[1], text_mods[0], dtype),
        attention_mask=mask,
        image_rotary_emb=rope,
    )
    advanced = []
    for stream, mixed, mods, norm, feed_forward in zip(streams, attended, modulations, norms[1], feed_forwards, strict=True):
        stream = stream + mods[2] * mixed.to(stream.dtype)
        inner = feed_forward(norm_with(norm, stream, mods[4], mods[3], dtype))
        advanced.append(stream + mods[5] * inner.to(stream.dtype))
    return advanced[0], advanced[1]


def run_single_block(block: Any, tokens_BLD: Tensor, modulation_BD: Tensor, rope: Rope) -> Tensor:
    """Text and picture after a block with one stream, which has attention and MLP in parallel."""
    if tokens_BLD.dtype == modulation_BD.dtype:
        normed_BLD, gate_BD = block.norm(tokens_BLD, emb=modulation_BD)
        mlp_BLD = block.act_mlp(block.proj_mlp(normed_BLD))
        mixed_BLD = block.attn(hidden_states=normed_BLD, image_rotary_emb=rope)
        return tokens_BLD + gate_BD.unsqueeze(1) * block.proj_out(torch.cat([mixed_BLD, mlp_BLD], dim=2))  # type: ignore[no-any-return]
    return run_single_with(block, tokens_BLD, _modulate(block.norm, modulation_BD, 3), modulation_BD.dtype, rope)


def run_single_with(
    block: Any, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, rope: Rope, mask: Tensor | None = None
) -> Tensor:
    """The tokens after a block with one stream whose shift, scale and gate are known, in the stream's dtype; `dtype` is the network's."""
    shift, scale, gate = modulations
    normed_BLD = norm_with(block.norm.norm, tokens_BLD, scale, shift, dtype)
    mlp_BLD = block.act_mlp(block.proj_mlp(normed_BLD))
    mixed_BLD = block.attn(hidden_states=normed_BLD, attention_mask=mask, image_rotary_emb=rope)
    return tokens_BLD + gate * block.proj_out(torch.cat([mixed_BLD, mlp_BLD], dim=2)).to(tokens_BLD.dtype)  # type: ignore[no-any-return]


def run_last_layer(network: Any, image_BLD: Tensor, modulation_BD: Tensor) -> Tensor:
    """Normalize the tokens and project them to latents."""
    if image_BLD.dtype != modulation_BD.dtype:
        scale, shift = _modulate(network.norm_out, modulation_BD, 2)
        return network.proj_out(norm_with(network.norm_out.norm, image_BLD, scale, shift, modulation_BD.dtype))  # type: ignore[no-any-return]
    return network.proj_out(network.norm_out(image_BLD, modulation_BD))  # type: ignore[no-any-return]


def _modulate(norm: Any, modulation_BD: Tensor, count: int) -> tuple[Tensor, ...]:
    """A norm's shifts, scales and gates, (B, 1, D) each, fp32."""
    numbers: Tensor = norm.linear(norm.silu(modulation_BD)).float()
    return tuple(part.unsqueeze(1) for part in numbers.chunk(count, dim=1))


def bare(norm: Any) -> nn.Module:
    """The norm without weights inside an adaptive one, or itself."""
    return getattr(norm, "norm", norm)  # type: ignore[no-any-return]


def norm_with(norm: nn.Module, stream_BLD: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm without weights, computed in the stream's dtype; the result has the network's."""
    return (norm(stream_BLD) * (1 + scale) + shift).to(dtype)  # type: ignore[no-any-return]


def picture_queries(block: Any, image_BLD: Tensor, modulation_BD: Tensor) -> Tensor:
    """The picture's queries in a block with two streams, (B, N, L, K), normalized per head and not rotated, in the network's dtype."""
    shift, scale = _modulate(block.norm1, modulation_BD, 6)[:2]
    normed_BLD = norm_with(block.norm1.norm, image_BLD, scale, shift, modulation_BD.dtype)
    query_BLNK: Tensor = block.attn.norm_q(block.attn.to_q(normed_BLD).unflatten(-1, (-1, block.attn.head_dim)))
    return query_BLNK.transpose(1, 2)


def embed_modulation(network: Any, times_B: Tensor, guidance_B: Tensor | None, pooled_BV: Tensor) -> Tensor:
    """What modulates every block, (B, D): times 0..1, pooled text, and the guidance (default 3.5) of a network that was distilled with it.

    Times and guidance stay fp32 up to their sinusoids.
    """
    embed, dtype = network.time_text_embed, pooled_BV.dtype
    sum_BD: Tensor = embed.timestep_embedder(embed.time_proj(times_B.float() * TIME_SCALE).to(dtype))
    if network.config.guidance_embeds:
        guidance_B = torch.full_like(times_B, DEFAULT_GUIDANCE) if guidance_B is None else guidance_B
        sum_BD = sum_BD + embed.guidance_embedder(embed.time_proj(guidance_B.float() * TIME_SCALE).to(dtype))
    return sum_BD + embed.text_embedder(pooled_BV)  # type: ignore[no-any-return]


def pack(x_BCHW: Tensor, cell: int = CELL) -> Tensor:
    """Latents as tokens of `cell` x `cell`, by default 2x2: (B, H/2 * W/2, 4 C), channel by channel. Odd sides are padded from the opposite edge."""
    missing_rows, missing_columns = -x_BCHW.shape[2] % cell, -x_BCHW.shape[3] % cell
    if missing_rows or missing_columns:
        x_BCHW = functional.pad(x_BCHW, (0, missing_columns, 0, missing_rows), mode="circular")
    batch, channels, height, width = x_BCHW.shape
    cells = x_BCHW.reshape(batch, channels, height // cell, cell, width // cell, cell)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * cell**2)


def unpack(tokens_BLD: Tensor, height: int, width: int, cell: int = CELL) -> Tensor:
    """The inverse: latents (B, C, height, width)."""
    rows, columns = -(-height // cell), -(-width // cell)
    cells = tokens_BLD.reshape(tokens_BLD.shape[0], rows, columns, -1, cell, cell)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(tokens_BLD.shape[0], -1, rows * cell, columns * cell)[:, :, :height, :width]


def picture_ids(rows: int, columns: int, number: int = 0) -> Tensor:
    """Positions of a picture's tokens, (rows * columns, 3): picture index, row, column."""
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).reshape(-1, 2)
    return functional.pad(places, (1, 0), value=number)
