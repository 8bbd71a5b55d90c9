"""Flux.1 as a list of segments over diffusers' FluxTransformer2DModel, with the block names that hooks use.

    start               patches of 2x2 latents become tokens; "image", "text", and the constants "modulation", "rope cosines", "rope sines"
    double_block 0..    consumes and produces "image" and "text"
    single_block 0..    the first joins them to "tokens" (text before picture), the others update those
    last 0              "flow": the picture's tokens, normalized, projected and put back into latents

A cut between two single blocks transfers one tensor. On one device in fp32, running all segments is bit for bit the library's `forward`. In half
precision, times and guidance stay fp32 up to their sinusoids, while the library rounds them first; in fp16 the streams are fp32
(backend/nn/flux_layers.py).

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from backend.families.flux.tiles import TilePlace, TileTokens, find_untileable, modulate, run_double_on_tile, run_single_on_tile
from backend.nn.block_segment import BlockSegment, residuals_from_the_first
from backend.nn.flux import DoubleStreamBlock, SingleStreamBlock, find_replaced_forward
from backend.nn.flux_controlnet import build_for_counting, usual_residuals
from backend.nn.flux_layers import CELL as CELL
from backend.nn.flux_layers import TIME_SCALE as TIME_SCALE
from backend.nn.flux_layers import FluxAttentionProcessor, Rope, embed_modulation, run_double_block, run_last_layer, run_single_block
from backend.nn.flux_layers import pack as pack
from backend.nn.flux_layers import picture_ids as picture_ids
from backend.nn.flux_layers import unpack as unpack
from backend.nn.program import Addition, ControlLists, NamedLayers, Program, ProgramState, Segment, TransformerOptions
from backend.nn.references import REFERENCES
from backend.nn.tiles import Cut, Swaps, Tile, TileTraffic, residual_of_rows
from backend.nn.transformer_controlnet import as_tokens

IMAGE, TEXT, TOKENS, MODULATION, COSINES, SINES, FLOW = "image", "text", "tokens", "modulation", "rope cosines", "rope sines", "flow"
DOUBLE, SINGLE, LAST = "double_block", "single_block", "last"
EXAMPLE_TEXT_TOKENS = 512
PEAK_NUMBERS = 18
"""Numbers in memory at a pass's peak, per token and unit of width: a single block's MLP (four times as wide), its output joined to attention's, the
stream, and rotated queries and keys in fp32. Counted on the meta device with fused attention: 16.4; a test keeps the estimate above the count."""
SAFETY = 1.5
"""Room for the scratch memory of kernels, the allocator's rounding, and fp32 streams where the network computes in fp16."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the picture that is made: rows and columns of its latents; and the number of text tokens, which come before its tokens.

    `cell`: latents per side of one token.
    """

    height: int
    width: int
    num_text: int
    cell: int = CELL

    @property
    def num_picture(self) -> int:
        """Tokens of the picture. Those of references come after them."""
        return -(-self.height // self.cell) * -(-self.width // self.cell)


SIZES = "flux_sizes"
"""Key of the sizes in the state's options, which travel with the state."""
_TILE_TOKENS = "flux_tile_tokens"
"""Key of the tiles' tokens in the options of a tile's state."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FluxSegment(BlockSegment):
    """One block with its modulation and rotations, a hook's "vec" and "pe"."""

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """As `__call__`, for a plan without replaced blocks."""
        state.options["block"] = self.key
        yield from self._run_on_tile(state, tile)
        self.add_residuals(state, at_end=True)

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        raise NotImplementedError

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return TilePlace(tile, state.options[_TILE_TOKENS], _rope(state))

    def _modulation(self, state: ProgramState) -> Tensor:
        return state.tensors[MODULATION]

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The block itself, with a hook's arguments."""
        raise NotImplementedError

    def _run_streams(self, state: ProgramState, streams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        args = {**streams, "vec": self._modulation(state), "pe": _rope(state), "attn_mask": None}
        return self.run_or_replace(state, args, partial(self._forward, state))

    def add_residuals(self, state: ProgramState, *, at_end: bool) -> None:
        """Add to the tokens of the picture that is made: after the text's, before those of references."""
        sizes: Sizes = state.options[SIZES]
        first = sizes.num_text if TOKENS in state.tensors else 0
        for addition in self.adds:
            if addition.at_end is at_end and (residual := state.residuals.pop(addition, None)) is not None:
                tokens = state.tensors[addition.target]
                residual = as_tokens(residual)
                end = first + sizes.num_picture
                before, picture, after = tokens[:, :first], tokens[:, first:end], tokens[:, end:]
                state.tensors[addition.target] = torch.cat([before, self._add(picture, residual), after], dim=1)


def _call_double(block: Any, image_BLD: Tensor, text_BTD: Tensor, modulation_BD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """(picture, text), by the block's own `forward`, which an extension may have wrapped."""
    if isinstance(block, DoubleStreamBlock):
        image_BLD, text_BTD = block(img=image_BLD, txt=text_BTD, vec=modulation_BD, pe=rope)
        return image_BLD, text_BTD
    return run_double_block(block, image_BLD, text_BTD, modulation_BD, rope)


def _call_single(block: Any, tokens_BLD: Tensor, modulation_BD: Tensor, rope: Rope) -> Tensor:
    if isinstance(block, SingleStreamBlock):
        return block(tokens_BLD, vec=modulation_BD, pe=rope)  # type: ignore[no-any-return]
    return run_single_block(block, tokens_BLD, modulation_BD, rope)


def _rope(state: ProgramState) -> Rope:
    return state.tensors[COSINES], state.tensors[SINES]


@dataclass(frozen=True, eq=False, kw_only=True)
class DoubleSegment(FluxSegment):
    """A block with two streams. A replacement hook takes and returns "img" and "txt"."""

    def _run(self, state: ProgramState) -> None:
        tensors = state.tensors
        out = self._run_streams(state, {"img": tensors[IMAGE], "txt": tensors[TEXT]})
        tensors[IMAGE], tensors[TEXT] = out["img"], out["txt"]

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        (block,), tensors = self.layers, state.tensors
        modulations, dtype, place = self._tile_modulations(state), tensors[MODULATION].dtype, self._place(state, tile)
        tensors[IMAGE], tensors[TEXT] = yield from run_double_on_tile(block, tensors[IMAGE], tensors[TEXT], modulations, dtype, place)

    def _tile_modulations(self, state: ProgramState) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Six shifts, scales and gates (B, 1, D) for the picture, and for the text."""
        block: Any = self.layers[0]
        image, text = (modulate(norm, state.tensors[MODULATION], 6, state.tensors[IMAGE].dtype) for norm in (block.norm1, block.norm1_context))
        return image, text

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        image, text = _call_double(self.layers[0], args["img"], args["txt"], args["vec"], args["pe"])
        return {"img": image, "txt": text}


@dataclass(frozen=True, eq=False, kw_only=True)
class SingleSegment(FluxSegment):
    """A block with one stream; `joins`: it is the first one. A replacement hook takes and returns "img", all tokens."""

    joins: bool

    def _run(self, state: ProgramState) -> None:
        tensors = state.tensors
        self._join(tensors)
        tensors[TOKENS] = self._run_streams(state, {"img": tensors[TOKENS]})["img"]

    def _join(self, tensors: dict[str, Tensor]) -> None:
        if self.joins:
            tensors[TOKENS] = torch.cat([tensors.pop(TEXT), tensors.pop(IMAGE)], dim=1)

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        (block,), tensors = self.layers, state.tensors
        self._join(tensors)
        modulations, dtype = self._tile_modulations(state), tensors[MODULATION].dtype
        tensors[TOKENS] = yield from run_single_on_tile(block, tensors[TOKENS], modulations, dtype, self._place(state, tile))

    def _tile_modulations(self, state: ProgramState) -> Sequence[Tensor]:
        """Shift, scale and gate (B, 1, D)."""
        block: Any = self.layers[0]
        return modulate(block.norm, state.tensors[MODULATION], 3, state.tensors[TOKENS].dtype)

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return {"img": _call_single(self.layers[0], args["img"], args["vec"], args["pe"])}


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(FluxSegment):
    """Turns the picture's tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        sizes: Sizes = state.options[SIZES]
        image_BLD = state.tensors.pop(TOKENS)[:, sizes.num_text :] if TOKENS in state.tensors else state.tensors.pop(IMAGE)
        state.tensors[FLOW] = unpack(self._project(image_BLD[:, : sizes.num_picture], state), sizes.height, sizes.width, sizes.cell)

    def _project(self, image_BLD: Tensor, state: ProgramState) -> Tensor:
        return run_last_layer(self.network, image_BLD, state.tensors[MODULATION])

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False)
class FluxEmbedding:
    """The layers before the blocks: embedders of picture, text, and of time, guidance and pooled text, whose sum modulates every block."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("x_embedder", "context_embedder", "time_text_embed", "pos_embed"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, guidance_B: Tensor | None, pooled_BV: Tensor) -> Tensor:
        """(B, D). `guidance_B` (default 3.5) is used only by a network that was distilled with it."""
        return embed_modulation(self.network, times_B, guidance_B, pooled_BV)


@dataclass(frozen=True, eq=False, kw_only=True)
class FluxProgram(Program):
    """Rows: "x" latents (B, 16, H, W), or 96 channels for Fill; "timesteps" times 0..1; "context" T5's features; "y" CLIP's pooled text;
    "guidance" (B,) for a network that takes it; "reference_1".. latents of pictures that its own tokens may attend to."""

    cell: ClassVar[int] = CELL
    embedding: FluxEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW, context_BLD = self.embedding.network, rows["x"], rows["context"]
        if "y" not in rows:
            raise ValueError(
                f"Flux needs the pooled text of CLIP-L, but none was given. Pass it as y, shape (batch, {network.config.pooled_projection_dim})."
            )
        num_rows, height, width = x_BCHW.shape[0], x_BCHW.shape[2], x_BCHW.shape[3]
        modulation_BD = self.embedding.modulate(rows["timesteps"], rows.get("guidance"), rows["y"].to(x_BCHW.dtype))
        packed_BLC, places_L3 = _pack_pictures(rows)
        if packed_BLC.shape[2] != network.config.in_channels:
            raise ValueError(
                f"A Flux model with {network.config.in_channels} inputs per token got {packed_BLC.shape[2]}. A Fill model takes a mask and a "
                "picture, a Canny or Depth model a picture of edges or depth, other models none of these."
            )
        image_BLD, text_BLD = network.x_embedder(packed_BLC), network.context_embedder(context_BLD)
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        ids_L3 = torch.cat([places_L3.new_zeros(text_BLD.shape[1], 3), places_L3])
        cosines_LK, sines_LK = network.pos_embed(ids_L3)
        tensors = {IMAGE: image_BLD, TEXT: text_BLD.expand(num_rows, -1, -1), MODULATION: modulation_BD, COSINES: cosines_LK, SINES: sines_LK}
        own_options = {**(options or {}), SIZES: Sizes(height, width, text_BLD.shape[1])}
        return ProgramState(tensors, dict(residuals or {}), own_options)

    def why_no_tiles(self) -> str | None:
        blocks = [pair for segment in self.segments if segment.kind != LAST for pair in segment.named_layers]
        return find_untileable(blocks, self._tile_kinds(), FluxAttentionProcessor)

    def _tile_kinds(self) -> tuple[type, ...]:
        """The classes of blocks that tiles know."""
        return FluxTransformerBlock, FluxSingleTransformerBlock, DoubleStreamBlock, SingleStreamBlock

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; every block needs the keys and values of all text and picture tokens."""
        (height, width), num_text = rows["x"].shape[-2:], rows["context"].shape[1]
        num_rows, num_blocks = -(-height // self.cell), len(self.segments) - 1
        num_tokens = num_text + num_rows * -(-width // self.cell)
        shared = 2 * num_blocks * num_tokens * self.embedding.network.inner_dim
        return TileTraffic(length=num_rows, unit=1, num_exchanges=num_blocks, halo_numbers=0, sum_numbers=0, shared_numbers=shared)

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        state, rank = self.start(rows, options=options), tile.rank
        whole: Sizes = state.options[SIZES]
        tokens = TileTokens.of(tile.cut, whole.num_text, -(-whole.width // self.cell))
        (start, end), tensors = tile.span, state.tensors
        tensors[IMAGE], tensors[TEXT] = tensors[IMAGE][:, tokens.image(rank)], tensors[TEXT][:, tokens.text(rank)]
        tensors[COSINES], tensors[SINES] = tokens.take_rope(_rope(state), rank)
        own_height = min(self.cell * end, whole.height) - self.cell * start
        state.options[SIZES] = replace(whole, height=own_height, num_text=tensors[TEXT].shape[1])
        state.options[_TILE_TOKENS] = tokens
        return state

    def residual_of_tile(self, residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
        """A tile's part of picture tokens, (B, L, D) or (B, D, rows, columns)."""
        return residual_of_rows(residual, cut, rank)

    def foreign_forward(self) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """A pass with the `inner_forward` that an extension put in the place of the network's own."""
        inner_forward = find_replaced_forward(self.embedding.network)
        return None if inner_forward is None else partial(self._run_foreign, inner_forward)

    def _run_foreign(self, inner_forward: Callable[..., Tensor], rows: Mapping[str, Tensor]) -> Tensor:
        """Forge's call of `inner_forward`: tokens, positions with the picture's after the text's zeros, times 0..1."""
        x_BCHW, text_BTD = rows["x"], rows["context"].expand(rows["x"].shape[0], -1, -1)
        (num_rows, _, height, width), (packed_BLC, places_L3) = x_BCHW.shape, _pack_pictures(rows)
        places_L3 = places_L3.to(x_BCHW.dtype)
        image_ids, text_ids = places_L3.expand(num_rows, -1, -1), places_L3.new_zeros(num_rows, text_BTD.shape[1], 3)
        flow_BLD = inner_forward(packed_BLC, image_ids, text_BTD, text_ids, rows["timesteps"], rows["y"].to(x_BCHW.dtype), rows.get("guidance"))
        return unpack(flow_BLD[:, : Sizes(height, width, 0).num_picture], height, width)

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """Entry i of "input" is added after double block i, entry i of "output" after single block i."""
        return residuals_from_the_first(self, control)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        rows = {
            "x": torch.empty(1, config.in_channels // CELL**2, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.joint_attention_dim, device="meta", dtype=dtype),
            "y": torch.empty(1, config.pooled_projection_dim, device="meta", dtype=dtype),
        }
        if config.guidance_embeds:
            rows["guidance"] = torch.empty(1, device="meta")
        return rows

    def build_control_network(self) -> nn.Module | None:
        network = self.embedding.network
        return build_for_counting(network) if "pooled_projection_dim" in network.config else None

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // self.cell) * -(-shape[3] // self.cell)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.inner_dim * itemsize  # type: ignore[no-any-return]


def make_segments(
    network: Any,
    double: Callable[..., Segment] = DoubleSegment,
    single: Callable[..., Segment] = SingleSegment,
    last: Callable[..., Segment] = LastSegment,
    ends: Sequence[str] = ("norm_out", "proj_out"),
) -> tuple[Segment, ...]:
    """One segment per block of a network with Flux's blocks, and one for its last layers `ends`."""
    streams, num_singles = (IMAGE, TEXT), len(network.single_transformer_blocks)
    doubles = [
        double(
            kind=DOUBLE, number=number, named_layers=((f"transformer_blocks.{number}", block),), consumes=streams, produces=streams,
            adds=(Addition("input", number, IMAGE),),
        )
        for number, block in enumerate(network.transformer_blocks)
    ]  # fmt: skip
    singles = [
        single(
            kind=SINGLE, number=number, named_layers=((f"single_transformer_blocks.{number}", block),),
            consumes=(TOKENS,) if number else streams, produces=(TOKENS,), adds=(Addition("output", number, TOKENS),), joins=number == 0,
        )
        for number, block in enumerate(network.single_transformer_blocks)
    ]  # fmt: skip
    last_layers = tuple((name, network.get_submodule(name)) for name in ends)
    end = last(kind=LAST, number=0, named_layers=last_layers, consumes=(TOKENS,) if num_singles else (IMAGE,), produces=(FLOW,), network=network)
    return (*doubles, *singles, end)


def build_flux_program(network: Any) -> FluxProgram:
    """Cut a FluxTransformer2DModel into its blocks, and make it use the chosen attention."""
    network.set_attn_processor(FluxAttentionProcessor())
    num_doubles, num_singles = len(network.transformer_blocks), len(network.single_transformer_blocks)
    return FluxProgram(
        embedding=FluxEmbedding(network),
        segments=make_segments(network),
        reads=("x", "timesteps", "context", "y", *(("guidance",) if network.config.guidance_embeds else ()), *_references_of(network)),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES),
        output=FLOW,
        control_kinds=("input", "output"),
        residual_share=usual_residuals(num_doubles, num_singles) / max(1, num_doubles + num_singles),
    )


def _pack_pictures(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of the picture that is made and of the references after it, (B, L, C), and their positions, (L, 3), fp32."""
    x_BCHW = rows["x"]
    references = [rows[name].to(x_BCHW) for name in REFERENCES if name in rows]
    packed_BLC = torch.cat([pack(x_BCHW), *(pack(one).expand(x_BCHW.shape[0], -1, -1) for one in references)], dim=1)
    own_L3 = picture_ids(-(-x_BCHW.shape[2] // CELL), -(-x_BCHW.shape[3] // CELL))
    places_L3 = torch.cat([own_L3, *place_references([one.shape[-2:] for one in references])])
    return packed_BLC, places_L3.to(x_BCHW.device, torch.float32)


def _references_of(network: Any) -> tuple[str, ...]:
    """Inputs for reference pictures: a network whose tokens are latents and nothing else has them."""
    return REFERENCES if network.config.in_channels == network.proj_out.out_features else ()


def place_references(sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Positions of the tokens of references of these sizes in latents: picture index 1, side by side on one canvas.

    Kontext was trained with one reference, whose positions begin at (1, 0, 0). Each further one goes to the right of the others or below them,
    where the canvas stays narrower: the network sees several pictures as one that was put together from them.
    """
    height = width = 0
    found = []
    for size in sizes:
        rows, columns = (-(-int(side) // CELL) for side in size)
        is_below = height + rows <= width + columns
        first = (height, 0) if is_below else (0, width)
        ids_L3 = picture_ids(rows, columns, 1)
        found.append(ids_L3 + torch.tensor([0, *first]))
        height, width = max(height, first[0] + rows), max(width, first[1] + columns)
    return found
