"""Blocks of Flux.1's kind on one tile: a share of the text's tokens and of the picture's, with the keys and values of all tiles.

One exchange per block. Keys and values are computed and sent first; the queries, and in blocks with one stream the MLP, are computed while they
travel. Text tokens are shared out too: on two slots, 512 of them on both would be a ninth of a 1024x1024 picture's work done twice.

Shapes: B rows, L tokens of this tile, T of all tiles, D token width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from backend.attention import attention_function
from backend.nn.flux_layers import Rope, bare, norm_with
from backend.nn.tiles import Cut, Received, Swaps, Tensors, Tile


@dataclass(frozen=True, slots=True)
class TileTokens:
    """Where each tile's text and picture tokens begin, and the ends of the last. In joined tokens, text comes before the picture."""

    text_begins: tuple[int, ...]
    image_begins: tuple[int, ...]

    @classmethod
    def of(cls, cut: Cut, num_text: int, columns: int) -> TileTokens:
        """Text is cut in the same proportions as the rows of picture tokens."""
        rows = cut.bounds[-1]
        return cls(tuple(bound * num_text // rows for bound in cut.bounds), tuple(bound * columns for bound in cut.bounds))

    @property
    def num_text(self) -> int:
        return self.text_begins[-1]

    def text(self, rank: int) -> slice:
        return slice(self.text_begins[rank], self.text_begins[rank + 1])

    def image(self, rank: int) -> slice:
        return slice(self.image_begins[rank], self.image_begins[rank + 1])

    def take_rope(self, rope: Rope, rank: int) -> Rope:
        """The rows of a tile's own tokens."""
        cosines, sines = (torch.cat([table[self.text(rank)], table[self.num_text :][self.image(rank)]]) for table in rope)
        return cosines, sines


@dataclass(frozen=True, slots=True)
class TilePlace:
    """Where a block runs: the tile with all tiles' tokens, the rotations of its own (of a network with RoPE), and which keys of all tokens count
    (None: all)."""

    tile: Tile
    tokens: TileTokens
    rope: Rope | None = None
    mask: Tensor | None = None


def run_double_on_tile(
    block: Any, image_BLD: Tensor, text_BLD: Tensor, modulations: tuple[Sequence[Tensor], Sequence[Tensor]], dtype: torch.dtype, place: TilePlace
) -> Swaps[tuple[Tensor, Tensor]]:
    """(picture, text) after a block with two streams, as `flux_layers.run_double_with`."""
    norms = (bare(block.norm1), bare(block.norm1_context)), (block.norm2, block.norm2_context)
    return run_two_streams_on_tile(block.attn, (image_BLD, text_BLD), modulations, norms, (block.ff, block.ff_context), dtype, place)


def run_two_streams_on_tile(
    attn: Any,
    streams: tuple[Tensor, Tensor],
    modulations: tuple[Sequence[Tensor], Sequence[Tensor]],
    norms: tuple[tuple[Any, Any], tuple[Any, Any]],
    feed_forwards: tuple[Any, Any],
    dtype: torch.dtype,
    place: TilePlace,
) -> Swaps[tuple[Tensor, Tensor]]:
    """(picture, text) of a tile, as `flux_layers.run_two_streams`."""
    image_BLD, text_BLD = streams
    num_text, tile, rope = text_BLD.shape[1], place.tile, place.rope
    image_mods, text_mods = modulations
    text_normed = norm_with(norms[0][1], text_BLD, text_mods[1], text_mods[0], dtype)
    image_normed = norm_with(norms[0][0], image_BLD, image_mods[1], image_mods[0], dtype)
    key = torch.cat([heads_of(attn, attn.add_k_proj, text_normed, attn.norm_added_k), heads_of(attn, attn.to_k, image_normed, attn.norm_k)], dim=1)
    value = torch.cat([heads_of(attn, attn.add_v_proj, text_normed), heads_of(attn, attn.to_v, image_normed)], dim=1)
    own = (_rotate(key, rope), value)
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    query = torch.cat([heads_of(attn, attn.add_q_proj, text_normed, attn.norm_added_q), heads_of(attn, attn.to_q, image_normed, attn.norm_q)], dim=1)
    query = _rotate(query, rope)
    received = yield awaited
    mixed_BLD = attend_to_all(attn, query, own, received, place)
    del own, received, key, value
    mixed_text, mixed_image = (
        attn.to_add_out(mixed_BLD[:, :num_text].contiguous()),
        attn.to_out[1](attn.to_out[0](mixed_BLD[:, num_text:].contiguous())),
    )
    return (
        finish_stream(image_BLD, mixed_image, image_mods, norms[1][0], feed_forwards[0], dtype),
        finish_stream(text_BLD, mixed_text, text_mods, norms[1][1], feed_forwards[1], dtype),
    )


def finish_stream(
    stream_BLD: Tensor, mixed_BLD: Tensor, mods: Sequence[Tensor], norm: nn.Module, feed_forward: nn.Module, dtype: torch.dtype
) -> Tensor:
    stream_BLD = stream_BLD + mods[2] * mixed_BLD
    inner_BLD: Tensor = feed_forward(norm_with(norm, stream_BLD, mods[4], mods[3], dtype))
    return stream_BLD + mods[5] * inner_BLD


def run_single_on_tile(block: Any, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, place: TilePlace) -> Swaps[Tensor]:
    """Text and picture after a block with one stream, as `flux_layers.run_single_with`."""
    attn, tile, rope = block.attn, place.tile, place.rope
    shift, scale, gate = modulations
    normed_BLD = norm_with(block.norm.norm, tokens_BLD, scale, shift, dtype)
    own = (
        _rotate(heads_of(attn, attn.to_k, normed_BLD, attn.norm_k), rope),
        heads_of(attn, attn.to_v, normed_BLD),
    )
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    query = _rotate(heads_of(attn, attn.to_q, normed_BLD, attn.norm_q), rope)
    mlp_BLD = block.act_mlp(block.proj_mlp(normed_BLD))
    received = yield awaited
    mixed_BLD = attend_to_all(attn, query, own, received, place)
    del own, received
    return tokens_BLD + gate * block.proj_out(torch.cat([mixed_BLD, mlp_BLD], dim=2))  # type: ignore[no-any-return]


def _rotate(heads_BLNK: Tensor, rope: Rope | None) -> Tensor:
    return heads_BLNK if rope is None else apply_rotary_emb(heads_BLNK, rope, sequence_dim=1)


def heads_of(attn: Any, layer: nn.Module, tokens_BLD: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Queries, keys or values, (B, L, N, K), normalized per head."""
    heads_BLNK: Tensor = layer(tokens_BLD).unflatten(-1, (attn.heads, -1))
    return heads_BLNK if norm is None else norm(heads_BLNK)


def attend_to_all(attn: Any, query_BLNK: Tensor, own: Tensors, received: Received, place: TilePlace) -> Tensor:
    """The tile's queries against the keys and values of all tiles, which lie in one buffer in the order of the whole."""
    tile, tokens = place.tile, place.tokens
    batch, _, heads, width = query_BLNK.shape
    gathered = tile.buffer("keys and values", (2, batch, tokens.num_text + tokens.image_begins[-1], heads, width), own[0])
    for rank in range(tile.peers.count):
        text, image = tokens.text(rank), tokens.image(rank)
        num_text = text.stop - text.start
        for part_BLNK, whole_BTNK in zip(received.get(rank, own), gathered):
            whole_BTNK[:, text].copy_(part_BLNK[:, :num_text])
            whole_BTNK[:, tokens.num_text :][:, image].copy_(part_BLNK[:, num_text:])
    query_BNLK, key_BNTK, value_BNTK = (one.transpose(1, 2) for one in (query_BLNK, gathered[0], gathered[1]))
    return attention_function(query_BNLK, key_BNTK, value_BNTK, attn.heads, place.mask, skip_reshape=True)


def modulate(norm: Any, modulation_BD: Tensor, count: int, stream_dtype: torch.dtype) -> Tensors:
    """A norm's shifts, scales and gates, (B, 1, D) each, in the stream's dtype."""
    numbers: Tensor = norm.linear(norm.silu(modulation_BD)).to(stream_dtype)
    return tuple(part.unsqueeze(1) for part in numbers.chunk(count, dim=1))


def find_untileable(named_blocks: Sequence[tuple[str, nn.Module]], kinds: Collection[type], *processors: type) -> str | None:
    """The first block that tiles do not compute exactly, and why; None if there is none. `kinds`, `processors`: what tiles know."""
    for name, block in named_blocks:
        if type(block) not in kinds:
            return f"{name} is a {type(block).__name__}"
        attn: Any = block.attn
        if type(attn.processor) not in processors:
            return f"{name}.attn has the processor {type(attn.processor).__name__}"
        changed = [one for one in (block, attn) if "forward" in one.__dict__ or one._forward_pre_hooks or one._forward_hooks]
        if changed:
            return f"{name} has been changed by an extension"
    return None
