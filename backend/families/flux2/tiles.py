"""Flux.2's single blocks on one tile, as `flux.tiles` runs Flux.1's: one exchange of keys and values a block.

Shapes: B rows, L tokens of this tile, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from backend.families.flux.tiles import TilePlace, attend_to_all
from backend.nn.flux2 import join_projection, split_projection
from backend.nn.flux_layers import norm_with
from backend.nn.tiles import Swaps


def run_single_on_tile(block: Any, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, place: TilePlace) -> Swaps[Tensor]:
    """Text and picture after a block with one stream, as `nn.flux2.run_single_block`."""
    attn, tile = block.attn, place.tile
    shift, scale, gate = modulations
    query, key, value, mlp = split_projection(attn, norm_with(block.norm, tokens_BLD, scale, shift, dtype))
    query, key = (apply_rotary_emb(heads, place.rope, sequence_dim=1) for heads in (query, key))
    own = (key, value)
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    received = yield awaited
    mixed_BLD = attend_to_all(attn, query, own, received, place)
    del own, received, key, value
    return tokens_BLD + gate * join_projection(attn, mixed_BLD, mlp).to(tokens_BLD.dtype)
