"""Lumina2 as a list of segments over diffusers' Lumina2Transformer2DModel, with the block names that hooks use.

    start               tokens of 2x2 latents ("image") and of text ("text"); the constants "modulation" (of the time), "rope cosines",
                        "rope sines" (text before picture), and "text mask" if rows' texts have different lengths
    context_refiner 0.. consumes and produces "text", without the time
    noise_refiner 0..   consumes and produces "image"
    layer 0..           the first joins them to "tokens" (text before picture), the others update those
    last 0              "flow": the picture's tokens, normalized, projected, put back into latents, and negated: the network predicts x0 - noise

Places: text (0, 0, 0), (1, 0, 0) ..; the picture's (n, row, column) behind n tokens of text. In fp32 the library's `forward` gives the same up to
rounding: it rotates by complex products.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.lumina2.identify import CELL
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
    BlockParts,
    StreamSegment,
    make_stream_segments,
)
from backend.families.zimage.layers import pack, unpack
from backend.nn.block_segment import BlockSegment
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, read_lengths
from backend.nn.program import Addition, NamedLayers, Program, ProgramState, TransformerOptions
from backend.nn.stream_layers import rotations
from backend.nn.stream_tiles import Spans, StreamPlace, join_spans, share_out, share_rows, spans_of
from backend.nn.tiles import Swaps, Tile, TileTraffic

THETA = 10_000.0
EXAMPLE_TEXT_TOKENS = 256
PEAK_NUMBERS = 20
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "lumina2_sizes"
"""Key of the latents' rows and columns, and of the number of text tokens, in the state's options, which travel with the state."""


def parts_of(block: Any) -> BlockParts:
    """A block's layers in diffusers' class."""
    norm, mlp = block.norm1, block.feed_forward
    return BlockParts(
        attention=block.attn, norm_before=norm.norm if block.modulation else norm, norm_behind=block.norm2, up=mlp.linear_3, gate=mlp.linear_1,
        down=mlp.linear_2, mlp_norm_before=block.ffn_norm1, mlp_norm_behind=block.ffn_norm2,
        modulate=(lambda modulation_BT: norm.linear(norm.silu(modulation_BT))) if block.modulation else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(BlockSegment):
    """Turns the picture's tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        height, width, num_text = state.options[_SIZES]
        tokens_BLD, modulation_BD = state.tensors.pop(TOKENS)[:, num_text:], state.tensors[MODULATION]
        layer = self.network.norm_out
        scale = 1.0 + layer.linear_1(layer.silu(modulation_BD)).unsqueeze(1).to(tokens_BLD.dtype)
        flow_BLD = layer.linear_2((layer.norm(tokens_BLD) * scale).to(modulation_BD.dtype))
        state.tensors[FLOW] = -unpack(flow_BLD, height, width)

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False)
class Lumina2Embedding:
    """The layers before the blocks."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("x_embedder", "time_caption_embed"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lumina2Program(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" 0..1, 1 for a clean picture; "context" Gemma2's features; "text_lengths" (B,) how many count."""

    embedding: Lumina2Embedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW, context_BLD = self.embedding.network, rows["x"], rows["context"]
        embed, num_rows, (height, width) = network.time_caption_embed, x_BCHW.shape[0], x_BCHW.shape[2:]
        lengths = read_lengths(rows.get(TEXT_LENGTHS), num_rows, context_BLD.shape[1])
        image_BLD = network.x_embedder(pack(x_BCHW))
        text_BLD = embed.caption_embedder(context_BLD[:, : max(lengths)]).expand(num_rows, -1, -1)
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        cells, distinct = (-(-height // CELL), -(-width // CELL)), lengths if len(set(lengths)) > 1 else lengths[:1]
        places = torch.stack([_places(*cells, text_BLD.shape[1], count) for count in distinct]).to(x_BCHW.device)
        cosines, sines = rotations(places, network.config.axes_dim_rope, THETA)
        modulation_BD = embed.timestep_embedder(embed.time_proj(rows["timesteps"].float()).to(x_BCHW.dtype))
        tensors = {IMAGE: image_BLD, TEXT: text_BLD, MODULATION: modulation_BD, COSINES: cosines, SINES: sines}
        if len(distinct) > 1:
            counts_BL = torch.arange(text_BLD.shape[1])[None] < torch.tensor(lengths)[:, None]
            mask = attention_mask(counts_BL.to(x_BCHW.device), image_BLD.shape[1])
            assert mask is not None
            tensors[MASK] = mask
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: (height, width, text_BLD.shape[1])})

    def why_no_tiles(self) -> str | None:
        return None

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; refiners of the picture need the keys and values of its tokens, layers those of all."""
        (height, width), num_text, network = rows["x"].shape[-2:], rows["context"].shape[1], self.embedding.network
        num_rows = -(-height // CELL)
        num_picture, num_refiners, num_layers = num_rows * -(-width // CELL), len(network.noise_refiner), len(network.layers)
        shared = num_refiners * num_picture + num_layers * (num_picture + num_text)
        return TileTraffic(
            length=num_rows, unit=1, num_exchanges=num_refiners + num_layers, halo_numbers=0, sum_numbers=0,
            shared_numbers=2 * shared * network.layers[0].attn.inner_kv_dim,
        )  # fmt: skip

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        """Texts stay whole until they join the picture."""
        state, (start, end) = self.start(rows, options=options), tile.span
        (height, width, num_text), tensors = state.options[_SIZES], state.tensors
        image, text = share_rows(tile.cut, -(-width // CELL)), share_out(tile.cut, num_text)
        tables = (tensors[COSINES], tensors[SINES])
        picture_tables = (tables[0][:, num_text:], tables[1][:, num_text:])
        places: dict[str, StreamPlace | Spans] = {
            IMAGE: StreamPlace.of(tile, spans_of(image), picture_tables),
            TOKENS: StreamPlace.of(tile, join_spans(text, image), tables, tensors.get(MASK)),
            TEXT: spans_of(text),
        }
        tensors[IMAGE] = spans_of(image).take(tensors[IMAGE], tile.rank)
        own_text = text[tile.rank].stop - text[tile.rank].start
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width, own_text), PLACES: places}
        return state

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.cap_feat_dim, device="meta", dtype=dtype),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * int(self.embedding.network.config.hidden_size) * itemsize


def build_lumina2_program(network: Any) -> Lumina2Program:
    """Cut a Lumina2Transformer2DModel into its blocks."""
    segments = make_stream_segments(network, partial(StreamSegment, parts_of=parts_of, text_first=True))
    ends = (("norm_out", network.norm_out),)
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(TOKENS,), produces=(FLOW,), network=network)
    return Lumina2Program(
        embedding=Lumina2Embedding(network),
        segments=(*segments, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
    )


def _places(rows: int, columns: int, num_text: int, length: int) -> Tensor:
    """Places (L, 3) of the text, padding included, and of the picture's tokens behind `length` tokens of text."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([functional.pad(torch.arange(num_text)[:, None], (0, 2)), functional.pad(grid, (1, 0), value=length)])
