"""Z-Image as a list of segments over diffusers' ZImageTransformer2DModel, with the block names that hooks use.

    start               tokens of 2x2 latents ("image") and of text ("text"), both padded with learned tokens to a multiple of 32; the constants
                        "modulation" (of the time), "rope cosines", "rope sines" (picture before text), and "text mask" if rows' texts differ
    context_refiner 0.. consumes and produces "text", without the time
    noise_refiner 0..   consumes and produces "image"
    layer 0..           the first joins them to "tokens" (picture before text), the others update those
    last 0              "flow": the picture's tokens, normalized, projected, put back into latents, and negated: the network predicts x0 - noise

In fp32 the library's `forward` gives the same up to rounding: it rotates by complex products.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.one_stream import (
    COSINES,
    FLOW,
    IMAGE,
    LAST,
    MASK,
    MODULATION,
    PLACES,
    SINES,
    TEXT,
    TOKENS,
    StreamSegment,
    make_stream_segments,
)
from backend.families.zimage.controlnet import build_for_counting
from backend.families.zimage.identify import CELL
from backend.families.zimage.layers import PATCH, ZImageEmbedding, parts_of, rounded, start_tensors, unpack
from backend.nn.block_segment import BlockSegment, residuals_from_the_first
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.program import Addition, ControlLists, Program, ProgramState, TransformerOptions
from backend.nn.stream_tiles import Spans, StreamPlace, join_spans, share_out, share_rows, spans_of
from backend.nn.tiles import Cut, Swaps, Tile, TileTraffic, residual_of_rows
from backend.nn.transformer_controlnet import as_tokens

EXAMPLE_TEXT_TOKENS = 128
"""A prompt of a hundred words in its template."""
PEAK_NUMBERS = 16
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "zimage_sizes"
"""Key of the latents' rows and columns in the state's options, which travel with the state."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ZImageSegment(StreamSegment):
    """A block of Z-Image, after which ControlNets add."""

    def add_residuals(self, state: ProgramState, *, at_end: bool) -> None:
        """Add to the picture's tokens, which come first, or to those behind them. A residual may be longer than its rows' text: that is padding."""
        for addition in self.adds:
            if addition.at_end is at_end and (residual := state.residuals.pop(addition, None)) is not None:
                hidden, first = state.tensors[addition.target], 0
                if addition.kind == "output":
                    height, width = state.options[_SIZES]
                    first = -(-height // CELL) * -(-width // CELL)
                    residual = as_tokens(residual)[:, : hidden.shape[1] - first]
                state.tensors[addition.target] = self._add_from(hidden, as_tokens(residual), first)

    def _add_from(self, hidden: Tensor, residual: Tensor, first: int) -> Tensor:
        num_after = hidden.shape[1] - first - residual.shape[1]
        if num_after < 0 or residual.shape[-1] != hidden.shape[-1]:
            return self._add(hidden, residual)  # which says that it does not fit
        return hidden + functional.pad(residual.to(hidden), (0, 0, first, num_after))


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(BlockSegment):
    """Turns the picture's tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        height, width = state.options[_SIZES]
        num_picture = -(-height // CELL) * -(-width // CELL)
        tokens_BLD, modulation_BD = state.tensors.pop(TOKENS)[:, :num_picture], state.tensors[MODULATION]
        layer = self.network.all_final_layer[PATCH]
        scale = 1.0 + layer.adaLN_modulation(modulation_BD).unsqueeze(1).to(tokens_BLD.dtype)
        flow_BLD = layer.linear((layer.norm_final(tokens_BLD) * scale).to(modulation_BD.dtype))
        state.tensors[FLOW] = -unpack(flow_BLD, height, width)

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False, kw_only=True)
class ZImageProgram(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" 0..1, 1 for a clean picture; "context" Qwen3's features; "text_lengths" (B,) how many count."""

    embedding: ZImageEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        tensors = start_tensors(self.embedding, rows)
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: tuple(rows["x"].shape[2:])})

    def why_no_tiles(self) -> str | None:
        return None

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; refiners of the picture need the keys and values of its tokens, layers those of all."""
        (height, width), num_text, network = rows["x"].shape[-2:], rounded(rows["context"].shape[1]), self.embedding.network
        num_rows = -(-height // CELL)
        num_picture = rounded(num_rows * -(-width // CELL))
        num_refiners, num_layers = len(network.noise_refiner), len(network.layers)
        shared = num_refiners * num_picture + num_layers * (num_picture + num_text)
        return TileTraffic(
            length=num_rows, unit=1, num_exchanges=num_refiners + num_layers, halo_numbers=0, sum_numbers=0,
            shared_numbers=2 * shared * network.layers[0].attention.inner_kv_dim,
        )  # fmt: skip

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        """The last tile has the picture's padding, too. Texts stay whole until they join the picture."""
        state, (start, end) = self.start(rows, options=options), tile.span
        (height, width), tensors = state.options[_SIZES], state.tensors
        num_picture, num_text, rope = tensors[IMAGE].shape[1], tensors[TEXT].shape[1], (tensors[COSINES], tensors[SINES])
        image, text = share_rows(tile.cut, -(-width // CELL), num_picture), share_out(tile.cut, num_text)
        places: dict[str, StreamPlace | Spans] = {
            IMAGE: StreamPlace.of(tile, spans_of(image), rope),
            TOKENS: StreamPlace.of(tile, join_spans(image, text), rope, tensors.get(MASK)),
            TEXT: spans_of(text),
        }
        tensors[IMAGE] = spans_of(image).take(tensors[IMAGE], tile.rank)
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width), PLACES: places}
        return state

    def residual_of_tile(self, residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
        """A tile's part of picture tokens (B, L, D)."""
        return residual_of_rows(residual, cut, rank)

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """After layer i, entry i of "input" is added to the picture, and entry i of "output" to the tokens behind it: its padding and the text."""
        return residuals_from_the_first(self, control)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.cap_feat_dim, device="meta", dtype=dtype),
        }

    def build_control_network(self) -> nn.Module | None:
        return build_for_counting(self.embedding.network)

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.dim * itemsize  # type: ignore[no-any-return]


def build_zimage_program(network: Any) -> ZImageProgram:
    """Cut a ZImageTransformer2DModel into its blocks."""
    segments = make_stream_segments(
        network,
        partial(ZImageSegment, parts_of=parts_of, text_first=False),
        lambda number: (Addition("input", number, TOKENS), Addition("output", number, TOKENS)),
    )
    ends = ((f"all_final_layer.{PATCH}", network.all_final_layer[PATCH]),)
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(TOKENS,), produces=(FLOW,), network=network)
    return ZImageProgram(
        embedding=ZImageEmbedding(network),
        segments=(*segments, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input", "output"),
        has_control_in_tiles=False,
    )
