"""SD3 and SD3.5 as a list of segments over diffusers' SD3Transformer2DModel, with the block names that hooks use.

    start               patches of 2x2 latents with their positions, and the text, become tokens: "image", "text"; the constant "modulation"
    double_block 0..    consumes and produces "image" and "text"; the last one makes no text
    last 0              "flow": the picture's tokens, normalized, projected and put back into latents

On one device in fp32, running all segments is bit for bit the library's `forward`. In half precision, times stay fp32 up to their sinusoids; in fp16
the streams are fp32 (layers.py).

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from backend.families.flux.tiles import TilePlace, TileTokens, find_untileable
from backend.families.sd3.controlnet import build_for_counting
from backend.families.sd3.layers import JointAttentionProcessor, modulate, pad_to_cells, run_joint_block
from backend.families.sd3.tiles import run_joint_on_tile
from backend.nn.block_segment import BlockSegment, residuals_from_the_first
from backend.nn.flux_layers import norm_with
from backend.nn.program import Addition, ControlLists, NamedLayers, Program, ProgramState, Segment, TransformerOptions
from backend.nn.tiles import Cut, Swaps, Tile, TileTraffic, residual_of_rows

IMAGE, TEXT, MODULATION, FLOW = "image", "text", "modulation", "flow"
BLOCK, LAST = "double_block", "last"
CELL = 2
EXAMPLE_TEXT_TOKENS = 333
"""CLIP's 77 and T5's 256."""
PEAK_NUMBERS = 14
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5
_SIZES = "sd3_sizes"
"""Key of the latents' rows and columns in the state's options, which travel with the state."""
_TILE_TOKENS = "sd3_tile_tokens"
"""Key of the tiles' tokens in the options of a tile's state."""


@dataclass(frozen=True, eq=False, kw_only=True)
class JointSegment(BlockSegment):
    """A block with two streams. A replacement hook takes and returns "img" and "txt". `transformer_options["skip_layers"]` leaves blocks out."""

    is_last: bool

    def _run(self, state: ProgramState) -> None:
        tensors = state.tensors
        if self.number not in state.options.get("skip_layers", ()):
            args = {"img": tensors[IMAGE], "txt": tensors[TEXT], "vec": tensors[MODULATION]}
            out = self.run_or_replace(state, args, self._forward)
            tensors[IMAGE], tensors[TEXT] = out["img"], out["txt"]
        if self.is_last:
            del tensors[TEXT]

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """As `__call__`, for a plan without replaced blocks."""
        tensors, (block,) = state.tensors, self.layers
        state.options["block"] = self.key
        if self.number not in state.options.get("skip_layers", ()):
            place = TilePlace(tile, state.options[_TILE_TOKENS])
            tensors[IMAGE], text_BLD = yield from run_joint_on_tile(block, tensors[IMAGE], tensors[TEXT], tensors[MODULATION], place)
            tensors[TEXT] = tensors[TEXT] if text_BLD is None else text_BLD
        if self.is_last:
            del tensors[TEXT]
        self.add_residuals(state, at_end=True)

    def _forward(self, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        image_BLD, text_BTD = run_joint_block(self.layers[0], args["img"], args["txt"], args["vec"])
        return {"img": image_BLD, "txt": args["txt"] if text_BTD is None else text_BTD}


@dataclass(frozen=True, eq=False, kw_only=True)
class LastSegment(BlockSegment):
    """Turns the picture's tokens back into latents."""

    network: Any

    def _run(self, state: ProgramState) -> None:
        image_BLD, modulation_BD = state.tensors.pop(IMAGE), state.tensors[MODULATION]
        scale, shift = modulate(self.network.norm_out, modulation_BD, 2, image_BLD.dtype)
        flow_BLD = self.network.proj_out(norm_with(self.network.norm_out.norm, image_BLD, scale, shift, modulation_BD.dtype))
        state.tensors[FLOW] = unpatch(flow_BLD, *state.options[_SIZES])

    def run_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        """Nothing crosses: the sizes in the state are the tile's."""
        self._run(state)
        yield from ()


@dataclass(frozen=True, eq=False)
class Sd3Embedding:
    """The layers before the blocks."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("pos_embed", "context_embedder", "time_text_embed"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sd3Program(Program):
    """Rows: "x" latents (B, 16, H, W); "timesteps" 0..1000; "context" the text of all encoders; "y" the pooled text of both CLIPs."""

    embedding: Sd3Embedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        if "y" not in rows:
            raise ValueError(
                "SD 3 needs the pooled text of CLIP-L and CLIP-G, but none was given. Pass it as y, shape "
                f"(batch, {network.config.pooled_projection_dim})."
            )
        height, width = x_BCHW.shape[2:]
        _check_size(network.config.pos_embed_max_size, height, width)
        image_BLD = network.pos_embed(pad_to_cells(x_BCHW)).contiguous()
        modulation_BD = network.time_text_embed(rows["timesteps"].float(), rows["y"].to(x_BCHW.dtype))
        text_BLD = network.context_embedder(rows["context"])
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        tensors = {IMAGE: image_BLD, TEXT: text_BLD.expand(x_BCHW.shape[0], -1, -1), MODULATION: modulation_BD}
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), _SIZES: (height, width)})

    def why_no_tiles(self) -> str | None:
        blocks = [pair for segment in self.segments if segment.kind == BLOCK for pair in segment.named_layers]
        return find_untileable(blocks, (JointTransformerBlock,), JointAttentionProcessor)

    def tile_traffic(self, rows: Mapping[str, Tensor]) -> TileTraffic:
        """Rows of tokens are cut; every block needs the keys and values of all tokens, some those of the picture's again."""
        (height, width), num_text, network = rows["x"].shape[-2:], rows["context"].shape[1], self.embedding.network
        num_rows = -(-height // CELL)
        num_picture = num_rows * -(-width // CELL)
        shared = sum(num_text + num_picture * (1 + bool(block.use_dual_attention)) for block in network.transformer_blocks)
        return TileTraffic(
            length=num_rows, unit=1, num_exchanges=len(network.transformer_blocks), halo_numbers=0, sum_numbers=0,
            shared_numbers=2 * shared * network.inner_dim,
        )  # fmt: skip

    def start_tile(self, rows: Mapping[str, Tensor], tile: Tile, *, options: TransformerOptions | None = None) -> ProgramState:
        state, rank, (start, end) = self.start(rows, options=options), tile.rank, tile.span
        (height, width), tensors = state.options[_SIZES], state.tensors
        tokens = TileTokens.of(tile.cut, tensors[TEXT].shape[1], -(-width // CELL))
        tensors[IMAGE], tensors[TEXT] = tensors[IMAGE][:, tokens.image(rank)], tensors[TEXT][:, tokens.text(rank)]
        state.options |= {_SIZES: (min(CELL * end, height) - CELL * start, width), _TILE_TOKENS: tokens}
        return state

    def residual_of_tile(self, residual: Tensor, cut: Cut, rank: int) -> Tensor | None:
        """A tile's part of picture tokens, (B, L, D) or (B, D, rows, columns)."""
        return residual_of_rows(residual, cut, rank)

    def name_residuals(self, control: ControlLists | None) -> dict[Addition, Tensor]:
        """Entry i of "output" is added to the picture after block i."""
        return residuals_from_the_first(self, control)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.joint_attention_dim, device="meta", dtype=dtype),
            "y": torch.empty(1, config.pooled_projection_dim, device="meta", dtype=dtype),
        }

    def build_control_network(self) -> nn.Module | None:
        return build_for_counting(self.embedding.network)

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.inner_dim * itemsize  # type: ignore[no-any-return]


def _check_size(max_cells: int, height: int, width: int) -> None:
    if max(height, width) > max_cells * CELL:
        raise ValueError(
            f"SD 3 was asked for {width * 8}x{height * 8} pixels, but this model knows positions up to {max_cells * CELL * 8} on each side. "
            "Choose a smaller size."
        )


def build_sd3_program(network: Any) -> Sd3Program:
    """Cut an SD3Transformer2DModel into its blocks, and make it use the chosen attention."""
    network.set_attn_processor(JointAttentionProcessor())
    blocks: list[Segment] = []
    for number, block in enumerate(network.transformer_blocks):
        streams = (IMAGE, TEXT)
        produces = (IMAGE,) if block.context_pre_only else streams
        adds = () if block.context_pre_only else (Addition("output", number, IMAGE),)
        named_layers = ((f"transformer_blocks.{number}", block),)
        blocks.append(
            JointSegment(
                kind=BLOCK, number=number, named_layers=named_layers, consumes=streams, produces=produces, adds=adds, is_last=block.context_pre_only
            )
        )
    ends = tuple((name, network.get_submodule(name)) for name in ("norm_out", "proj_out"))
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(IMAGE,), produces=(FLOW,), network=network)
    return Sd3Program(
        embedding=Sd3Embedding(network),
        segments=(*blocks, last),
        reads=("x", "timesteps", "context", "y"),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION,),
        output=FLOW,
        control_kinds=("output",),
    )


def unpatch(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of tokens whose numbers lie row by row in a patch, channels last."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    cells = tokens_BLD.reshape(tokens_BLD.shape[0], rows, columns, CELL, CELL, -1)
    return torch.einsum("nhwpqc->nchpwq", cells).reshape(tokens_BLD.shape[0], -1, rows * CELL, columns * CELL)[:, :, :height, :width]
