"""Flux.2-klein as a list of segments: Flux.1's, with modulations that all blocks of a kind share and with latents that are tokens as they are.

    start               "modulation": the step's vectors (B, 17, D): three for single blocks, six for the picture and six for the text in double
                        blocks, shift and scale of the last layer; "text mask", if the rows' texts have different lengths
    double_block 0..    consumes and produces "image" and "text"
    single_block 0..    the first joins them to "tokens" (text before picture, references behind it), the others update those
    last 0              "flow"

Positions have four parts: text (0, 0, 0, number), picture (0, row, column, 0), the k-th reference (10 k, row, column, 0). The streams are fp32 if the
network computes in fp16. On one device in fp32, running all segments is bit for bit the library's `forward`.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor, Flux2SingleTransformerBlock, Flux2TransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from backend.families.flux.program import (
    COSINES,
    EXAMPLE_TEXT_TOKENS,
    FLOW,
    IMAGE,
    LAST,
    MODULATION,
    SINES,
    SIZES,
    TEXT,
    TIME_SCALE,
    TOKENS,
    FluxProgram,
    Sizes,
    make_segments,
    pack,
    picture_ids,
)
from backend.families.flux.tiles import find_untileable
from backend.families.flux.vector_segments import MASK, VectorDoubleSegment, VectorLastSegment, VectorSingleSegment
from backend.families.flux2.tiles import run_single_on_tile
from backend.nn.flux2 import run_single_block
from backend.nn.flux_layers import FluxAttentionProcessor, Rope
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, trim_text
from backend.nn.program import Addition, NamedLayers, ProgramState, TransformerOptions
from backend.nn.references import REFERENCES
from backend.nn.tiles import Swaps, Tile

REFERENCE_STEP = 10
"""Between the first parts of the positions of two references, and of the picture and the first."""
_SINGLE_AT, _PICTURE_AT, _TEXT_AT = 0, 3, 9
"""Numbers of the first vectors of each kind."""


class Flux2SingleSegment(VectorSingleSegment):
    """A block with one stream, whose matrix for attention and MLP is one."""

    def _run_block(self, tokens_BLD: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype, rope: Rope, mask: Tensor | None) -> Tensor:
        return run_single_block(self.layers[0], tokens_BLD, modulations, dtype, rope, mask)

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        (block,), tensors = self.layers, state.tensors
        self._join(tensors)
        modulations, dtype = self._tile_modulations(state), tensors[MODULATION].dtype
        tensors[TOKENS] = yield from run_single_on_tile(block, tensors[TOKENS], modulations, dtype, self._place(state, tile))


@dataclass(frozen=True, eq=False)
class Flux2Embedding:
    """The layers before the blocks: embedders of picture, text and time, and the matrices that make all modulations."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        names = (
            "x_embedder", "context_embedder", "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt",
            "single_stream_modulation", "norm_out", "pos_embed",
        )  # fmt: skip
        return tuple((name, self.network.get_submodule(name)) for name in names)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 17, D) of times 0..1, which stay fp32 up to their sinusoids."""
        network, embed = self.network, self.network.time_guidance_embed
        time_BD: Tensor = embed.timestep_embedder(embed.time_proj(times_B.float() * TIME_SCALE).to(dtype))
        kinds = (network.single_stream_modulation, network.double_stream_modulation_img, network.double_stream_modulation_txt)
        last = network.norm_out
        scale_BD, shift_BD = last.linear(last.silu(time_BD)).chunk(2, dim=1)
        vectors_BD = torch.cat([*(kind(time_BD) for kind in kinds), shift_BD, scale_BD], dim=1)
        return vectors_BD.unflatten(1, (-1, network.inner_dim))  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class Flux2Program(FluxProgram):
    """Rows: "x" latents (B, 128, H, W); "timesteps" times 0..1; "context" Qwen3's features; "text_lengths" (B,) how many of them count;
    "reference_1".. latents of pictures that its own tokens may attend to."""

    cell: ClassVar[int] = 1
    embedding: Flux2Embedding  # type: ignore[assignment]  # read by this class alone

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        num_rows, height, width = x_BCHW.shape[0], x_BCHW.shape[2], x_BCHW.shape[3]
        references = [rows[name].to(x_BCHW) for name in REFERENCES if name in rows]
        context_BLD, counts_BL = trim_text(rows["context"], rows.get(TEXT_LENGTHS))
        packed_BLC = torch.cat([pack(x_BCHW, 1), *(pack(one, 1).expand(num_rows, -1, -1) for one in references)], dim=1)
        image_BLD, text_BLD = network.x_embedder(packed_BLC), network.context_embedder(context_BLD)
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        places_L4 = place_tokens(text_BLD.shape[1], [(height, width), *(one.shape[-2:] for one in references)])
        cosines_LK, sines_LK = network.pos_embed(places_L4.to(x_BCHW.device))
        tensors = {
            IMAGE: image_BLD, TEXT: text_BLD.expand(num_rows, -1, -1), MODULATION: self.embedding.modulate(rows["timesteps"], x_BCHW.dtype),
            COSINES: cosines_LK, SINES: sines_LK,
        }  # fmt: skip
        mask = attention_mask(counts_BL, image_BLD.shape[1])
        if mask is not None:
            tensors[MASK] = mask
        own_options = {**(options or {}), SIZES: Sizes(height, width, text_BLD.shape[1], cell=1)}
        return ProgramState(tensors, dict(residuals or {}), own_options)

    def why_no_tiles(self) -> str | None:
        blocks = [pair for segment in self.segments if segment.kind != LAST for pair in segment.named_layers]
        kinds = (Flux2TransformerBlock, Flux2SingleTransformerBlock)
        return find_untileable(blocks, kinds, FluxAttentionProcessor, Flux2ParallelSelfAttnProcessor)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.joint_attention_dim, device="meta", dtype=dtype),
        }


def place_tokens(num_text: int, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Positions (L, 4) of text and pictures of these sizes in latents, the one that is made before its references."""
    text_L4 = functional.pad(torch.arange(num_text)[:, None], (3, 0))
    pictures = [functional.pad(picture_ids(rows, columns, REFERENCE_STEP * number), (0, 1)) for number, (rows, columns) in enumerate(sizes)]
    return torch.cat([text_L4, *pictures]).float()


def build_flux2_program(network: Any) -> Flux2Program:
    """Cut a Flux2Transformer2DModel into its blocks, and make it use the chosen attention."""
    for block in network.transformer_blocks:
        block.attn.set_processor(FluxAttentionProcessor())
    return Flux2Program(
        embedding=Flux2Embedding(network),
        segments=make_segments(
            network,
            lambda **facts: VectorDoubleSegment(**facts, first_picture=_PICTURE_AT, first_text=_TEXT_AT),
            lambda **facts: Flux2SingleSegment(**facts, first=_SINGLE_AT),
            VectorLastSegment,
            ends=("proj_out",),
        ),
        reads=("x", "timesteps", "context", TEXT_LENGTHS, *REFERENCES),
        inputs=(IMAGE, TEXT),
        constants=(MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input", "output"),
    )
