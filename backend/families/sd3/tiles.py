"""SD3's blocks on one tile: a share of the text's tokens and of the picture's, with the keys and values of all tiles.

One exchange per block: those of the second attention, over the picture alone, travel with those of the first.

Shapes: B rows, L tokens of this tile, D token width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backend.families.flux.tiles import TilePlace, TileTokens, attend_to_all, finish_stream, heads_of
from backend.families.sd3.layers import modulate
from backend.nn.flux_layers import norm_with
from backend.nn.tiles import Swaps, Tensors


def run_joint_on_tile(
    block: Any, image_BLD: Tensor, text_BLD: Tensor, modulation_BD: Tensor, place: TilePlace
) -> Swaps[tuple[Tensor, Tensor | None]]:
    """(picture, text) after a block, as `layers.run_joint_block`; the last one has no text."""
    attn, dtype, is_last, tile = block.attn, modulation_BD.dtype, block.context_pre_only, place.tile
    mods = modulate(block.norm1, modulation_BD, 9 if block.use_dual_attention else 6, image_BLD.dtype)
    text_mods = modulate(block.norm1_context, modulation_BD, 2 if is_last else 6, text_BLD.dtype)
    shift, scale = text_mods[::-1] if is_last else text_mods[:2]  # the last norm has its scale first
    image_normed = norm_with(block.norm1.norm, image_BLD, mods[1], mods[0], dtype)
    text_normed = norm_with(block.norm1_context.norm, text_BLD, scale, shift, dtype)
    key = torch.cat([heads_of(attn, attn.add_k_proj, text_normed, attn.norm_added_k), heads_of(attn, attn.to_k, image_normed, attn.norm_k)], dim=1)
    value = torch.cat([heads_of(attn, attn.add_v_proj, text_normed), heads_of(attn, attn.to_v, image_normed)], dim=1)
    own: Tensors = (key, value)
    dual = block.attn2
    dual_normed = norm_with(block.norm1.norm, image_BLD, mods[7], mods[6], dtype) if block.use_dual_attention else None
    if dual_normed is not None:
        own = (*own, heads_of(dual, dual.to_k, dual_normed, dual.norm_k), heads_of(dual, dual.to_v, dual_normed))
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    text_query = [] if is_last else [heads_of(attn, attn.add_q_proj, text_normed, attn.norm_added_q)]
    query = torch.cat([*text_query, heads_of(attn, attn.to_q, image_normed, attn.norm_q)], dim=1)
    dual_query = None if dual_normed is None else heads_of(dual, dual.to_q, dual_normed, dual.norm_q)
    received = yield awaited
    mixed_BLD = attend_to_all(attn, query, own[:2], {rank: one[:2] for rank, one in received.items()}, place)
    num_text = query.shape[1] - image_BLD.shape[1]
    image_BLD = image_BLD + mods[2] * attn.to_out[1](attn.to_out[0](mixed_BLD[:, num_text:]))
    if dual_query is not None:
        picture = replace(place, tokens=TileTokens((0,) * len(place.tokens.text_begins), place.tokens.image_begins))
        dual_BLD = attend_to_all(dual, dual_query, own[2:], {rank: one[2:] for rank, one in received.items()}, picture)
        image_BLD = image_BLD + mods[8] * dual.to_out[1](dual.to_out[0](dual_BLD))
    inner_BLD = block.ff(norm_with(block.norm2, image_BLD, mods[4], mods[3], dtype))
    image_BLD = image_BLD + mods[5] * inner_BLD
    if is_last:
        return image_BLD, None
    text_mixed = attn.to_add_out(mixed_BLD[:, :num_text])
    return image_BLD, finish_stream(text_BLD, text_mixed, text_mods, block.norm2_context, block.ff_context, dtype)
