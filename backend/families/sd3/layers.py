"""Runs SD3's blocks with diffusers' modules, step for step as the library does, with the residual streams in a dtype of their own.

If the network computes in fp16, streams, modulations and norms are fp32, and only the inputs of matrices and attention are fp16.

Shapes: B rows, L picture tokens, T text tokens, D token width, N heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backend.attention import attention_function
from backend.families.sd3.identify import PATCH
from backend.nn.flux_layers import norm_with


class JointAttentionProcessor:
    """A block's attention over the joined tokens, picture before text, or over the picture alone, with the chosen implementation."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        parts = [_project(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            parts.append(_project(attn, encoder_hidden_states, layers, norms))
        query, key, value = (torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts))
        mixed_BLD = attention_function(query, key, value, attn.heads, attention_mask, skip_reshape=True)
        num_picture = hidden_states.shape[1]
        picture_BLD = attn.to_out[1](attn.to_out[0](mixed_BLD[:, :num_picture]))
        if encoder_hidden_states is None:
            return picture_BLD  # type: ignore[no-any-return]
        text_BTD = mixed_BLD[:, num_picture:]
        return picture_BLD, text_BTD if attn.context_pre_only else attn.to_add_out(text_BTD)


def _project(attn: Any, tokens_BLD: Tensor, layers: tuple[Any, ...], norms: tuple[Any, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalized per head where the network does, and values, all (B, N, L, K)."""
    query, key, value = (layer(tokens_BLD).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers)
    return query if norms[0] is None else norms[0](query), key if norms[1] is None else norms[1](key), value


def run_joint_block(block: Any, image_BLD: Tensor, text_BTD: Tensor, modulation_BD: Tensor) -> tuple[Tensor, Tensor | None]:
    """(picture, text) after a block; the last one has no text. The modulation has the network's dtype, the streams may have another."""
    dtype, is_last = modulation_BD.dtype, block.context_pre_only
    mods = modulate(block.norm1, modulation_BD, 9 if block.use_dual_attention else 6, image_BLD.dtype)
    text_mods = modulate(block.norm1_context, modulation_BD, 2 if is_last else 6, text_BTD.dtype)
    shift, scale = text_mods[::-1] if is_last else text_mods[:2]  # the last norm has its scale first
    picture_mixed, text_mixed = block.attn(
        hidden_states=norm_with(block.norm1.norm, image_BLD, mods[1], mods[0], dtype),
        encoder_hidden_states=norm_with(block.norm1_context.norm, text_BTD, scale, shift, dtype),
    )
    dual_BLD = norm_with(block.norm1.norm, image_BLD, mods[7], mods[6], dtype) if block.use_dual_attention else None
    image_BLD = image_BLD + mods[2] * picture_mixed.to(image_BLD.dtype)
    if dual_BLD is not None:
        image_BLD = image_BLD + mods[8] * block.attn2(hidden_states=dual_BLD).to(image_BLD.dtype)
    inner = block.ff(norm_with(block.norm2, image_BLD, mods[4], mods[3], dtype))
    image_BLD = image_BLD + mods[5] * inner.to(image_BLD.dtype)
    if is_last:
        return image_BLD, None
    text_BTD = text_BTD + text_mods[2] * text_mixed.to(text_BTD.dtype)
    inner = block.ff_context(norm_with(block.norm2_context, text_BTD, text_mods[4], text_mods[3], dtype))
    return image_BLD, text_BTD + text_mods[5] * inner.to(text_BTD.dtype)


def run_single_block(block: Any, image_BLD: Tensor, modulation_BD: Tensor) -> Tensor:
    """The picture after a block without text, as ControlNets for SD3.5 large have them."""
    dtype = modulation_BD.dtype
    mods = modulate(block.norm1, modulation_BD, 6, image_BLD.dtype)
    mixed = block.attn(hidden_states=norm_with(block.norm1.norm, image_BLD, mods[1], mods[0], dtype))
    image_BLD = image_BLD + mods[2] * mixed.to(image_BLD.dtype)
    inner: Tensor = block.ff(norm_with(block.norm2, image_BLD, mods[4], mods[3], dtype))
    return image_BLD + mods[5] * inner.to(image_BLD.dtype)


def modulate(norm: Any, modulation_BD: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A norm's shifts, scales and gates, (B, 1, D) each, in the stream's dtype."""
    numbers: Tensor = norm.linear(norm.silu(modulation_BD)).to(dtype)
    return tuple(part.unsqueeze(1) for part in numbers.chunk(count, dim=1))


def pad_to_cells(x_BCHW: Tensor) -> Tensor:
    """Odd sides padded from the opposite edge."""
    height, width = x_BCHW.shape[2:]
    return functional.pad(x_BCHW, (0, width % PATCH, 0, height % PATCH), mode="circular") if height % PATCH or width % PATCH else x_BCHW
