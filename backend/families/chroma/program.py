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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    FluxProgram,
    Sizes,
    make_segments,
    pack,
    picture_ids,
)
from backend.families.flux.vector_segments import MASK, VectorDoubleSegment, VectorLastSegment, VectorSingleSegment
from backend.nn.flux_layers import FluxAttentionProcessor
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, trim_text
from backend.nn.program import Addition, NamedLayers, ProgramState, TransformerOptions


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
            lambda **facts: VectorDoubleSegment(
                **facts, first_picture=first_picture + 6 * facts["number"], first_text=first_text + 6 * facts["number"]
            ),
            lambda **facts: VectorSingleSegment(**facts, first=3 * facts["number"]),
            VectorLastSegment,
        ),
        reads=("x", "timesteps", "context", TEXT_LENGTHS),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input", "output"),
    )
