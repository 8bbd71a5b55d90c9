"""Chroma as a list of segments: Flux.1's, with modulations that come ready from the distilled guidance layer instead of a matrix in each block.

    start               "modulation": all modulation vectors of the step (B, M, D), those of single blocks first, then those of the picture and of the
                        text in double blocks, then the last layer's; "text mask", if the rows' texts have different lengths
    double_block 0..    as Flux.1's, with 12 of the vectors
    single_block 0..    with 3
    last 0              with 2

The streams are fp32 if the network computes in fp16 (nn/flux_layers.py). On one device in fp32, running all segments is bit for bit the library's
`forward` of texts without padding.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, M modulation vectors, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock, ChromaTransformerBlock
from torch import Tensor, nn

from backend.families.flux.program import (
    CELL,
    COSINES,
    EXAMPLE_TEXT_TOKENS,
    FLOW,
    IMAGE,
    MODULATION,
    SINES,
    SIZES,
    TEXT,
    TIME_SCALE,
    TOKENS,
    DoubleSegment,
    FluxProgram,
    LastSegment,
    SingleSegment,
    Sizes,
    make_segments,
    pack,
    picture_ids,
)
from backend.families.flux.tiles import TilePlace
from backend.nn.flux_layers import FluxAttentionProcessor, norm_with, run_double_with, run_single_with
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, trim_text
from backend.nn.program import Addition, NamedLayers, ProgramState, TransformerOptions
from backend.nn.tiles import Tile

MASK = "text mask"


def _parts(modulation_BMD: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, (B, 1, D) each, in the streams' dtype."""
    return modulation_BMD.to(dtype).split(1, dim=1)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class ChromaDoubleSegment(DoubleSegment):
    """A block with two streams. `first_picture`, `first_text`: the numbers of its first vectors; a hook's "vec" are all 12."""

    first_picture: int
    first_text: int

    def _modulation(self, state: ProgramState) -> Tensor:
        vectors = state.tensors[MODULATION]
        starts = (self.first_picture, self.first_text)
        return torch.cat([vectors[:, start + 6 * self.number : start + 6 * self.number + 6] for start in starts], dim=1)

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        parts = _parts(args["vec"], args["img"].dtype)
        image_BLD, text_BTD = run_double_with(
            self.layers[0], args["img"], args["txt"], (parts[:6], parts[6:]), args["vec"].dtype, args["pe"], state.tensors.get(MASK)
        )
        return {"img": image_BLD, "txt": text_BTD}

    def _tile_modulations(self, state: ProgramState) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        parts = _parts(self._modulation(state), state.tensors[IMAGE].dtype)
        return parts[:6], parts[6:]

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return replace(super()._place(state, tile), mask=state.tensors.get(MASK))


class ChromaSingleSegment(SingleSegment):
    """A block with one stream; a hook's "vec" are its three vectors."""

    def _modulation(self, state: ProgramState) -> Tensor:
        return state.tensors[MODULATION][:, 3 * self.number : 3 * self.number + 3]

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        parts = _parts(args["vec"], args["img"].dtype)
        return {"img": run_single_with(self.layers[0], args["img"], parts, args["vec"].dtype, args["pe"], state.tensors.get(MASK))}

    def _tile_modulations(self, state: ProgramState) -> Sequence[Tensor]:
        return _parts(self._modulation(state), state.tensors[TOKENS].dtype)

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return replace(super()._place(state, tile), mask=state.tensors.get(MASK))


class ChromaLastSegment(LastSegment):
    """Turns the picture's tokens back into latents."""

    def _project(self, image_BLD: Tensor, state: ProgramState) -> Tensor:
        vectors = state.tensors[MODULATION]
        shift, scale = _parts(vectors[:, -2:], image_BLD.dtype)
        return self.network.proj_out(norm_with(self.network.norm_out.norm, image_BLD, scale, shift, vectors.dtype))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class ChromaEmbedding:
    """The layers before the blocks: embedders of picture and text, and the net that makes all modulations."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        names = ("x_embedder", "context_embedder", "distilled_guidance_layer", "pos_embed")
        return tuple((name, self.network.get_submodule(name)) for name in names)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, M, D)."""
        inputs_BMC: Tensor = self.network.time_text_embed(times_B.float() * TIME_SCALE)
        return self.network.distilled_guidance_layer(inputs_BMC.to(dtype))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class ChromaProgram(FluxProgram):
    """Rows: "x" latents (B, 16, H, W); "timesteps" times 0..1; "context" T5's features; "text_lengths" (B,) how many of them count."""

    embedding: ChromaEmbedding  # type: ignore[assignment]  # read by this class alone

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        num_rows, height, width = x_BCHW.shape[0], x_BCHW.shape[2], x_BCHW.shape[3]
        context_BLD, counts_BL = trim_text(rows["context"], rows.get(TEXT_LENGTHS))
        modulation_BMD = self.embedding.modulate(rows["timesteps"], x_BCHW.dtype)
        image_BLD, text_BLD = network.x_embedder(pack(x_BCHW)), network.context_embedder(context_BLD)
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        places_L3 = picture_ids(-(-height // CELL), -(-width // CELL)).to(text_BLD.device, torch.float32)
        cosines_LK, sines_LK = network.pos_embed(torch.cat([places_L3.new_zeros(text_BLD.shape[1], 3), places_L3]))
        tensors = {IMAGE: image_BLD, TEXT: text_BLD.expand(num_rows, -1, -1), MODULATION: modulation_BMD, COSINES: cosines_LK, SINES: sines_LK}
        mask = attention_mask(counts_BL, image_BLD.shape[1])
        if mask is not None:
            tensors[MASK] = mask
        own_options = {**(options or {}), SIZES: Sizes(height, width, text_BLD.shape[1])}
        return ProgramState(tensors, dict(residuals or {}), own_options)

    def _tile_kinds(self) -> tuple[type, ...]:
        return ChromaTransformerBlock, ChromaSingleTransformerBlock

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels // CELL**2, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.joint_attention_dim, device="meta", dtype=dtype),
        }


def build_chroma_program(network: Any) -> ChromaProgram:
    """Cut a ChromaTransformer2DModel into its blocks, and make it use the chosen attention."""
    network.set_attn_processor(FluxAttentionProcessor())
    first_picture = 3 * len(network.single_transformer_blocks)
    first_text = first_picture + 6 * len(network.transformer_blocks)
    return ChromaProgram(
        embedding=ChromaEmbedding(network),
        segments=make_segments(
            network,
            partial(ChromaDoubleSegment, first_picture=first_picture, first_text=first_text),
            ChromaSingleSegment,
            ChromaLastSegment,
        ),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input", "output"),
    )
