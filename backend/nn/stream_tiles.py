"""Attention of transformers with one stream on one tile: a share of the tokens, with the keys and values of all tiles.

Keys and values are computed and sent first, before heads are repeated; the queries are computed while they travel. One exchange per block.

Shapes: B rows, L tokens of this tile, T of all tiles, D token width, N heads, M heads of keys and values, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backend.nn.stream_layers import Rope, heads_of, join_heads, rotate
from backend.nn.tiles import Cut, Received, Swaps, Tensors, Tile


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each tile's tokens lie among those of the whole: for each tile, slices in the order of its own tokens. `length`: tokens of the whole.

    Example, 6 picture tokens before 2 of text on two tiles: ((0:3, 6:7), (3:6, 7:8)), length 8.
    """

    by_rank: tuple[tuple[slice, ...], ...]
    length: int

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """A tile's part of (B, T, ...)."""
        parts = [whole[:, span] for span in self.by_rank[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def share_out(cut: Cut, num_tokens: int) -> tuple[slice, ...]:
    """Tokens that are no rows of a picture, in the proportions of the cut."""
    begins = [bound * num_tokens // cut.bounds[-1] for bound in cut.bounds]
    return tuple(slice(first, end) for first, end in pairwise(begins))


def share_rows(cut: Cut, columns: int, num_tokens: int | None = None) -> tuple[slice, ...]:
    """Tokens of a picture by rows of `columns`. With `num_tokens` the last tile has the padding up to there, too."""
    begins = [bound * columns for bound in cut.bounds]
    begins[-1] = begins[-1] if num_tokens is None else num_tokens
    return tuple(slice(first, end) for first, end in pairwise(begins))


def join_spans(first: Sequence[slice], second: Sequence[slice]) -> Spans:
    """Spans of two kinds of tokens, the first before the second."""
    shift = first[-1].stop
    moved = [slice(span.start + shift, span.stop + shift) for span in second]
    return Spans(tuple(zip(first, moved)), moved[-1].stop)


def spans_of(own: Sequence[slice]) -> Spans:
    """Spans of one kind of tokens."""
    return Spans(tuple((span,) for span in own), own[-1].stop)


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where a block runs: the tile, all tiles' tokens, the rotations of its own tokens, and which keys of all tokens count (None: all)."""

    tile: Tile
    spans: Spans
    rope: Rope
    mask: Tensor | None = None

    @classmethod
    def of(cls, tile: Tile, spans: Spans, whole_rope: Rope, mask: Tensor | None = None) -> StreamPlace:
        cosines, sines = (spans.take(table, tile.rank) for table in whole_rope)
        return cls(tile, spans, (cosines, sines), mask)


def attend_on_tile(attn: Any, tokens_BLD: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """As `stream_layers.attend`, for the tile's own queries."""
    tile, rope = place.tile, place.rope
    own: Tensors = (rotate(attn.norm_k(heads_of(attn, attn.to_k, tokens_BLD)), rope), heads_of(attn, attn.to_v, tokens_BLD))
    awaited = tile.peers.post(dict.fromkeys(tile.others, own))
    query_BLNK = rotate(attn.norm_q(heads_of(attn, attn.to_q, tokens_BLD)), rope)
    received = yield awaited
    key_BTMK, value_BTMK = gather_heads(own, received, place)
    del own, received
    return join_heads(attn, query_BLNK, key_BTMK, value_BTMK, place.mask)


def gather_heads(own: Tensors, received: Received, place: StreamPlace) -> tuple[Tensor, Tensor]:
    """Keys and values of all tiles in the order of the whole, in one buffer per shape."""
    batch, _, heads, width = own[0].shape
    gathered = place.tile.buffer("keys and values", (2, batch, place.spans.length, heads, width), own[0])
    for rank, spans in enumerate(place.spans.by_rank):
        for part_BLMK, whole_BTMK in zip(received.get(rank, own), gathered):
            first = 0
            for span in spans:
                count = span.stop - span.start
                whole_BTMK[:, span].copy_(part_BLMK[:, first : first + count])
                first += count
    return gathered[0], gathered[1]
