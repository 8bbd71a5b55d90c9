"""Z-Image as a list of segments over diffusers' ZImageTransformer2DModel, with the block names that hooks use.

    start               tokens of 2x2 latents ("image") and of text ("text"), both padded with learned tokens to a multiple of 32; the constants
                        "modulation" (of the time), "rope cosines", "rope sines" (picture before text), and "text mask" if rows' texts differ
    context_refiner 0.. consumes and produces "text", without the time
    noise_refiner 0..   consumes and produces "image"
    layer 0..           the first joins them to "tokens" (picture before text), the others update those
    last 0              "flow": the picture's tokens, normalized, projected, put back into latents, and negated: the network predicts x0 - noise

Places: text (1, 0, 0), (2, 0, 0) ..; the picture's (n + 1, row, column) behind n padded text tokens, so that rows with longer texts have other
rotations. In fp32 the library's `forward` gives the same up to rounding: it rotates by complex products.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.zimage.identify import CELL
from backend.nn.block_segment import BlockSegment, residuals_from_the_first
from backend.nn.padded_text import TEXT_LENGTHS, read_lengths
from backend.nn.program import Addition, ControlLists, NamedLayers, Program, ProgramState, Segment, TransformerOptions
from backend.nn.stream_layers import Rope, attend, gated, rms_norm, rotations
from backend.nn.stream_tiles import Spans, StreamPlace, attend_on_tile, join_spans, share_out, share_rows, spans_of
from backend.nn.tiles import Cut, Swaps, Tile, TileTraffic, residual_of_rows

IMAGE, TEXT, TOKENS, MODULATION, COSINES, SINES, MASK, FLOW = (
    "image", "text", "tokens", "modulation", "rope cosines", "rope sines", "text mask", "flow",
)  # fmt: skip
CONTEXT, NOISE, LAYER, LAST = "context_refiner", "noise_refiner", "layer", "last"
PATCH = "2-1"
MULTIPLE = 32
"""Numbers of tokens are multiples of this, in training too."""
EXAMPLE_TEXT_TOKENS = 128
"""A prompt of a hundred words in its template."""
PEAK_NUMBERS = 16
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "zimage_sizes"
"""Key of the latents' rows and columns in the state's options, which travel with the state."""
_PLACES = "zimage_places"
"""Key of where each stream's tokens are, in the options of a tile's state."""
Modulation = tuple[Tensor | float, ...]
"""Scale and gate of attention, scale and gate of the MLP."""


def run_block(block: Any, tokens_BLD: Tensor, modulation_BD: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """The tokens after a block, which has attention, then an MLP, each between two norms. Its modulation, if any, has the network's dtype."""
    numbers = _modulate(block, modulation_BD, tokens_BLD.dtype)
    mixed_BLD = attend(block.attention, _norm_in(block, tokens_BLD, numbers, modulation_BD.dtype), rope, mask)
    return _finish_block(block, tokens_BLD, mixed_BLD, numbers, modulation_BD.dtype)


def run_block_on_tile(block: Any, tokens_BLD: Tensor, modulation_BD: Tensor, place: StreamPlace) -> Swaps[Tensor]:
    """`run_block` for a tile's tokens."""
    numbers = _modulate(block, modulation_BD, tokens_BLD.dtype)
    mixed_BLD = yield from attend_on_tile(block.attention, _norm_in(block, tokens_BLD, numbers, modulation_BD.dtype), place)
    return _finish_block(block, tokens_BLD, mixed_BLD, numbers, modulation_BD.dtype)


def _norm_in(block: Any, stream_BLD: Tensor, numbers: Modulation, dtype: torch.dtype) -> Tensor:
    """What attention reads."""
    return (rms_norm(block.attention_norm1, stream_BLD) * numbers[0]).to(dtype)


def _finish_block(block: Any, stream_BLD: Tensor, mixed_BLD: Tensor, numbers: Modulation, dtype: torch.dtype) -> Tensor:
    """The stream after attention's result and the MLP."""
    _, attention_gate, mlp_scale, mlp_gate = numbers
    stream_BLD = stream_BLD + attention_gate * rms_norm(block.attention_norm2, mixed_BLD.to(stream_BLD.dtype))
    mlp = block.feed_forward
    inner_BLD = gated(mlp.w3, mlp.w1, mlp.w2, (rms_norm(block.ffn_norm1, stream_BLD) * mlp_scale).to(dtype))
    return stream_BLD + mlp_gate * rms_norm(block.ffn_norm2, inner_BLD.to(stream_BLD.dtype))


def _modulate(block: Any, modulation_BD: Tensor, dtype: torch.dtype) -> Modulation:
    """Scales and gates of attention and MLP, (B, 1, D) each in the stream's dtype; ones in a block that does not read the time."""
    if not block.modulation:
        return 1.0, 1.0, 1.0, 1.0
    numbers: Tensor = block.adaLN_modulation(modulation_BD).unsqueeze(1).to(dtype)
    attention_scale, attention_gate, mlp_scale, mlp_gate = numbers.chunk(4, dim=2)
    return 1.0 + attention_scale, attention_gate.tanh(), 1.0 + mlp_scale, mlp_gate.tanh()


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamSegment(BlockSegment):
    """A block over `stream`. A replacement hook takes and returns "img" (or "txt" in a refiner of text)."""

    stream: str

    def _run(self, state: ProgramState) -> None:
        name = "txt" if self.stream == TEXT else "img"
        args = {name: state.tensors[self.stream], "vec": state.tensors[MODULATION], "pe": self._rope(state)}

        def forward(args: Mapping[str, Any]) -> Mapping[str, Tensor]:
            return {name: run_block(self.layers[0], args[name], args["vec"], args["pe"], self._mask(state))}

        state.tensors[self.stream] = self.run_or_replace(state, args, forward)[name]

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Refiners of the text run whole on every tile: its few tokens cost less than exchanges."""
        state.options["block"] = self.key
        if self.stream == TEXT:
            self._run(state)
        else:
            tokens_BLD, place = state.tensors[self.stream], state.options[_PLACES][self.stream]
            state.tensors[self.stream] = yield from run_block_on_tile(self.layers[0], tokens_BLD, state.tensors[MODULATION], place)
        self.add_residuals(state, at_end=True)

    def _rope(self, state: ProgramState) -> Rope:
        cosines, sines = state.tensors[COSINES], state.tensors[SINES]
        if self.stream == TOKENS:
            return cosines, sines
        length = state.tensors[self.stream].shape[1]
        part = slice(0, length) if self.stream == IMAGE else slice(-length, None)
        return cosines[:, part], sines[:, part]

    def _mask(self, state: ProgramState) -> Tensor | None:
        """Which keys count: all of the picture's."""
        mask = state.tensors.get(MASK)
        if mask is None or self.stream == IMAGE:
            return None
        return mask if self.stream == TOKENS else mask[..., -state.tensors[TEXT].shape[1] :]

    def _add(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Add to the picture's tokens, which come first."""
        num_others = hidden.shape[1] - residual.shape[1]
        if num_others < 0 or residual.shape[-1] != hidden.shape[-1]:
            return super()._add(hidden, residual)
        return hidden + functional.pad(residual.to(hidden), (0, 0, 0, num_others))


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedSegment(StreamSegment):
    """A block over picture and text; `joins`: it is the first one."""

    joins: bool

    def _run(self, state: ProgramState) -> None:
        if self.joins:
            state.tensors[TOKENS] = torch.cat([state.tensors.pop(IMAGE), state.tensors.pop(TEXT)], dim=1)
        super()._run(state)

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        if self.joins:
            text_BLD = state.options[_PLACES][TEXT].take(state.tensors.pop(TEXT), tile.rank)
            state.tensors[TOKENS] = torch.cat([state.tensors.pop(IMAGE), text_BLD], dim=1)
        yield from super().run_tile(state, tile)


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


@dataclass(frozen=True, eq=False)
class ZImageEmbedding:
    """The layers before the blocks, and the learned tokens of padding, which are the network's own."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in (f"all_x_embedder.{PATCH}", "cap_embedder", "t_embedder", "pads"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 256) of times 0..1, 1 for a clean picture."""
        embed = self.network.t_embedder
        features = embed.timestep_embedding(times_B.float() * self.network.t_scale, embed.frequency_embedding_size)
        return embed.mlp(features.to(dtype))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class ZImageProgram(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" 0..1, 1 for a clean picture; "context" Qwen3's features; "text_lengths" (B,) how many count."""

    embedding: ZImageEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW, context_BLD = self.embedding.network, rows["x"], rows["context"]
        num_rows, (height, width) = x_BCHW.shape[0], x_BCHW.shape[2:]
        lengths = read_lengths(rows.get(TEXT_LENGTHS), num_rows, context_BLD.shape[1])
        padded = [_rounded(length) for length in lengths]
        image_BLD = _pad(network.all_x_embedder[PATCH](pack(x_BCHW)), network.pads.picture)
        text_BLD = network.cap_embedder(context_BLD[:, : max(lengths)]).expand(num_rows, -1, -1)
        text_BLD = _pad_rows(_pad(text_BLD, network.pads.text), lengths, network.pads.text)
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        cells = (-(-height // CELL), -(-width // CELL))
        distinct = padded if len(set(padded)) > 1 else padded[:1]
        places = torch.stack([_places(*cells, image_BLD.shape[1], text_BLD.shape[1], count) for count in distinct]).to(x_BCHW.device)
        cosines, sines = rotations(places, network.axes_dims, network.rope_theta)
        modulation_BD = self.embedding.modulate(rows["timesteps"], x_BCHW.dtype)
        tensors = {IMAGE: image_BLD, TEXT: text_BLD, MODULATION: modulation_BD, COSINES: cosines, SINES: sines}
        if min(padded) < text_BLD.shape[1]:
            tensors[MASK] = _mask(padded, image_BLD.shape[1], text_BLD.shape[1]).to(x_BCHW.device)
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: (height, width)})

    def why_no_tiles(self) -> str | None:
        return None

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; refiners of the picture need the keys and values of its tokens, layers those of all."""
        (height, width), num_text, network = rows["x"].shape[-2:], _rounded(rows["context"].shape[1]), self.embedding.network
        num_rows = -(-height // CELL)
        num_picture = _rounded(num_rows * -(-width // CELL))
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
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width), _PLACES: places}
        return state

    def residual_of_tile(self, residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
        """A tile's part of picture tokens (B, L, D)."""
        return residual_of_rows(residual, cut, rank)

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """Entry i of "input" is added to the picture after layer i."""
        return residuals_from_the_first(self, control)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.cap_feat_dim, device="meta", dtype=dtype),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.dim * itemsize  # type: ignore[no-any-return]


def build_zimage_program(network: Any) -> ZImageProgram:
    """Cut a ZImageTransformer2DModel into its blocks."""
    refiners: list[Segment] = [
        StreamSegment(
            kind=kind, number=number, named_layers=((f"{kind}.{number}", block),), consumes=(stream,), produces=(stream,), stream=stream
        )
        for kind, stream in ((CONTEXT, TEXT), (NOISE, IMAGE))
        for number, block in enumerate(getattr(network, kind))
    ]  # fmt: skip
    layers: list[Segment] = [
        JoinedSegment(
            kind=LAYER, number=number, named_layers=((f"layers.{number}", block),), consumes=(TOKENS,) if number else (IMAGE, TEXT),
            produces=(TOKENS,), adds=(Addition("input", number, TOKENS),), stream=TOKENS, joins=number == 0,
        )
        for number, block in enumerate(network.layers)
    ]  # fmt: skip
    ends = ((f"all_final_layer.{PATCH}", network.all_final_layer[PATCH]),)
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(TOKENS,), produces=(FLOW,), network=network)
    return ZImageProgram(
        embedding=ZImageEmbedding(network),
        segments=(*refiners, *layers, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input",),
    )


def pack(x_BCHW: Tensor) -> Tensor:
    """Latents as tokens of 2x2, (B, H/2 * W/2, 4 C), channels last. Odd sides are padded from the opposite edge."""
    if x_BCHW.shape[2] % CELL or x_BCHW.shape[3] % CELL:
        x_BCHW = functional.pad(x_BCHW, (0, x_BCHW.shape[3] % CELL, 0, x_BCHW.shape[2] % CELL), mode="circular")
    batch, channels, height, width = x_BCHW.shape
    cells = x_BCHW.reshape(batch, channels, height // CELL, CELL, width // CELL, CELL)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * CELL**2)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse: latents (B, C, height, width)."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    cells = tokens_BLD.reshape(tokens_BLD.shape[0], rows, columns, CELL, CELL, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(tokens_BLD.shape[0], -1, rows * CELL, columns * CELL)[:, :, :height, :width]


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _pad(tokens_BLD: Tensor, pad_1D: Tensor) -> Tensor:
    """Learned tokens behind the others, up to a multiple of 32."""
    missing = _rounded(tokens_BLD.shape[1]) - tokens_BLD.shape[1]
    return torch.cat([tokens_BLD, pad_1D.to(tokens_BLD).expand(tokens_BLD.shape[0], missing, -1)], dim=1) if missing else tokens_BLD


def _pad_rows(text_BLD: Tensor, lengths: Sequence[int], pad_1D: Tensor) -> Tensor:
    """Learned tokens in the place of what does not count in shorter rows."""
    if min(lengths) == max(lengths):
        return text_BLD
    counts_BL = torch.arange(text_BLD.shape[1])[None] < torch.tensor(lengths)[:, None]
    return torch.where(counts_BL.to(text_BLD.device)[..., None], text_BLD, pad_1D.to(text_BLD))


def _mask(padded: Sequence[int], num_picture: int, num_text: int) -> Tensor:
    """Which keys count, (B, 1, 1, L): those behind a row's own padding do not."""
    counts_BL = torch.arange(num_picture + num_text)[None] < num_picture + torch.tensor(padded)[:, None]
    return counts_BL[:, None, None]


def _places(rows: int, columns: int, num_picture: int, num_text: int, padded_text: int) -> Tensor:
    """Places (L, 3) of the picture's tokens, its padding (all 0) and the text, in the order of joined tokens."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).reshape(-1, 2)
    picture = functional.pad(functional.pad(grid, (1, 0), value=padded_text + 1), (0, 0, 0, num_picture - len(grid)))
    return torch.cat([picture, functional.pad(torch.arange(1, num_text + 1)[:, None], (0, 2))])
