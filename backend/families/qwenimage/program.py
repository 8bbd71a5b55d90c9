"""Qwen-Image as a list of segments over diffusers' QwenImageTransformer2DModel, with the block names that hooks use. Tiles are Flux.1's.

    start               patches of 2x2 latents become tokens: "image" (references behind the picture that is made) and "text"; the constants
                        "modulation" (of the time), "reference modulation" (of time 0, for editing models that have one), "rope cosines",
                        "rope sines" (text before picture), and "text mask" if rows' texts have different lengths
    double_block 0..    consumes and produces "image" and "text"
    last 0              "flow": the picture's tokens, normalized, projected and put back into latents

Places: a picture's center is at row 0 and column 0, the first axis counts pictures; the text goes on along the diagonal, from half the longest side.
In fp32 the library's `forward` gives the same up to rounding: it rotates by complex products. In half precision, times stay fp32 up to their
sinusoids; in fp16 the streams are fp32 (nn/flux_layers.py).

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from backend.families.flux.program import (
    COSINES,
    DOUBLE,
    FLOW,
    IMAGE,
    LAST,
    MODULATION,
    SINES,
    SIZES,
    TEXT,
    DoubleSegment,
    FluxProgram,
    LastSegment,
    Sizes,
)
from backend.families.flux.tiles import TilePlace, run_two_streams_on_tile
from backend.families.qwenimage.identify import CELL
from backend.nn.flux_layers import FluxAttentionProcessor, Rope, pack, picture_ids, run_two_streams
from backend.nn.padded_text import TEXT_LENGTHS, attention_mask, trim_text
from backend.nn.program import Addition, NamedLayers, ProgramState, TransformerOptions
from backend.nn.references import REFERENCES
from backend.nn.stream_layers import rotations
from backend.nn.tiles import Swaps, Tile

REFERENCE_MODULATION, MASK = "reference modulation", "text mask"
THETA = 10_000.0
EXAMPLE_TEXT_TOKENS = 128
PEAK_NUMBERS = 13
"""Numbers in memory at a pass's peak, per token and unit of width; a test keeps the estimate above what is counted on the meta device."""
SAFETY = 1.5


@dataclass(frozen=True, eq=False, kw_only=True)
class QwenSegment(DoubleSegment):
    """A block with two streams. A replacement hook takes and returns "img" and "txt"."""

    def _forward(self, state: ProgramState, args: Mapping[str, Any]) -> Mapping[str, Tensor]:
        block: Any = self.layers[0]
        sizes: Sizes = state.options[SIZES]
        image_BLD, text_BTD, vector_BD = args["img"], args["txt"], args["vec"]
        image_mods = modulations(block.img_mod, vector_BD, image_BLD.dtype)
        if (reference_BD := state.tensors.get(REFERENCE_MODULATION)) is not None and image_BLD.shape[1] > sizes.num_picture:
            clean_mods = modulations(block.img_mod, reference_BD, image_BLD.dtype)
            image_mods = [_per_token(own, clean, sizes.num_picture, image_BLD) for own, clean in zip(image_mods, clean_mods)]
        text_mods = modulations(block.txt_mod, vector_BD, text_BTD.dtype)
        image_BLD, text_BTD = run_two_streams(
            block.attn, (image_BLD, text_BTD), (image_mods, text_mods), *_norms_and_mlps(block), vector_BD.dtype, args["pe"], state.tensors.get(MASK)
        )
        return {"img": image_BLD, "txt": text_BTD}

    def _run_on_tile(self, state: ProgramState, tile: Tile) -> Swaps[None]:
        block: Any = self.layers[0]
        tensors, vector_BD = state.tensors, state.tensors[MODULATION]
        mods = modulations(block.img_mod, vector_BD, tensors[IMAGE].dtype), modulations(block.txt_mod, vector_BD, tensors[TEXT].dtype)
        tensors[IMAGE], tensors[TEXT] = yield from run_two_streams_on_tile(
            block.attn, (tensors[IMAGE], tensors[TEXT]), mods, *_norms_and_mlps(block), vector_BD.dtype, self._place(state, tile)
        )

    def _place(self, state: ProgramState, tile: Tile) -> TilePlace:
        return replace(super()._place(state, tile), mask=state.tensors.get(MASK))


Pair = tuple[Any, Any]


def _norms_and_mlps(block: Any) -> tuple[tuple[Pair, Pair], Pair]:
    """The picture's and the text's norms before attention, those before the MLPs, and the MLPs."""
    return ((block.img_norm1, block.txt_norm1), (block.img_norm2, block.txt_norm2)), (block.img_mlp, block.txt_mlp)


def modulations(layers: nn.Module, vector_BD: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Shift, scale and gate for attention and for the MLP, (B, 1, D) each, in the stream's dtype."""
    numbers: Tensor = layers(vector_BD).to(dtype)
    return numbers.unsqueeze(1).chunk(6, dim=2)


def _per_token(own_B1D: Tensor, clean_B1D: Tensor, num_own: int, like_BLD: Tensor) -> Tensor:
    """(B, L, D): one number for the first tokens, another for those of references."""
    batch, length, width = like_BLD.shape
    return torch.cat([own_B1D.expand(batch, num_own, width), clean_B1D.expand(batch, length - num_own, width)], dim=1)


@dataclass(frozen=True, eq=False)
class QwenEmbedding:
    """The layers before the blocks."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in ("img_in", "txt_norm", "txt_in", "time_text_embed"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, D) of times 0..1."""
        embed = self.network.time_text_embed
        return embed.timestep_embedder(embed.time_proj(times_B.float()).to(dtype))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class QwenProgram(FluxProgram):
    """Rows: "x" latents (B, 16, H, W); "timesteps" times 0..1; "context" Qwen2.5-VL's features; "text_lengths" (B,) how many of them count;
    "reference_1".. latents of pictures that its own tokens may attend to."""

    embedding: QwenEmbedding  # type: ignore[assignment]  # read by this class alone

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        num_rows, height, width = x_BCHW.shape[0], x_BCHW.shape[2], x_BCHW.shape[3]
        context_BLD, counts_BL = trim_text(rows["context"], rows.get(TEXT_LENGTHS))
        pictures = [x_BCHW, *(rows[name].to(x_BCHW) for name in REFERENCES if name in rows)]
        packed_BLC = torch.cat([pack(one).expand(num_rows, -1, -1) for one in pictures], dim=1)
        image_BLD, text_BLD = network.img_in(packed_BLC), network.txt_in(network.txt_norm(context_BLD))
        if x_BCHW.dtype == torch.float16:
            image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
        places_L3 = place_tokens([one.shape[-2:] for one in pictures], text_BLD.shape[1]).to(x_BCHW.device)
        cosines_LK, sines_LK = rope_table(places_L3, network.config.axes_dims_rope)
        tensors = {
            IMAGE: image_BLD, TEXT: text_BLD.expand(num_rows, -1, -1), MODULATION: self.embedding.modulate(rows["timesteps"], x_BCHW.dtype),
            COSINES: cosines_LK, SINES: sines_LK,
        }  # fmt: skip
        if network.config.zero_cond_t and len(pictures) > 1:
            tensors[REFERENCE_MODULATION] = self.embedding.modulate(torch.zeros_like(rows["timesteps"][:1]), x_BCHW.dtype)
        mask = attention_mask(counts_BL, image_BLD.shape[1])
        if mask is not None:
            tensors[MASK] = mask
        own_options = {**(options or {}), SIZES: Sizes(height, width, text_BLD.shape[1])}
        return ProgramState(tensors, dict(residuals or {}), own_options)

    def _tile_kinds(self) -> tuple[type, ...]:
        return (QwenImageTransformerBlock,)

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.embedding.network.config
        return {
            "x": torch.empty(1, config.in_channels // CELL**2, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "context": torch.empty(1, max(context_length, EXAMPLE_TEXT_TOKENS), config.joint_attention_dim, device="meta", dtype=dtype),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        num_tokens = EXAMPLE_TEXT_TOKENS + -(-shape[2] // CELL) * -(-shape[3] // CELL)
        return SAFETY * PEAK_NUMBERS * shape[0] * num_tokens * self.embedding.network.inner_dim * itemsize  # type: ignore[no-any-return]


def build_qwen_program(network: Any) -> QwenProgram:
    """Cut a QwenImageTransformer2DModel into its blocks, and make it use the chosen attention."""
    network.set_attn_processor(FluxAttentionProcessor())
    streams = (IMAGE, TEXT)
    blocks = [
        QwenSegment(
            kind=DOUBLE, number=number, named_layers=((f"transformer_blocks.{number}", block),), consumes=streams, produces=streams,
            adds=(Addition("input", number, IMAGE),),
        )
        for number, block in enumerate(network.transformer_blocks)
    ]  # fmt: skip
    ends = tuple((name, network.get_submodule(name)) for name in ("norm_out", "proj_out"))
    last = LastSegment(kind=LAST, number=0, named_layers=ends, consumes=(IMAGE,), produces=(FLOW,), network=network)
    return QwenProgram(
        embedding=QwenEmbedding(network),
        segments=(*blocks, last),
        reads=("x", "timesteps", "context", TEXT_LENGTHS, *REFERENCES),
        inputs=streams,
        constants=(MODULATION, REFERENCE_MODULATION, COSINES, SINES, MASK),
        output=FLOW,
        control_kinds=("input",),
    )


def place_tokens(sizes: Sequence[Sequence[int]], num_text: int) -> Tensor:
    """Places (L, 3) of the text's tokens, then of pictures of these sizes in latents.

    Example: a picture of 3x2 cells has rows -2, -1, 0 and columns -1, 0; the text begins at (1, 1, 1).
    """
    first_text, pictures = 0, []
    for number, size in enumerate(sizes):
        rows, columns = (-(-side // CELL) for side in size)
        first_text = max(first_text, rows // 2, columns // 2)
        pictures.append(picture_ids(rows, columns, number) - torch.tensor([0, rows - rows // 2, columns - columns // 2]))
    text_L3 = torch.arange(first_text, first_text + num_text)[:, None].expand(-1, 3)
    return torch.cat([text_L3, *pictures])


def rope_table(places_L3: Tensor, widths: Sequence[int]) -> Rope:
    """Cosines and sines (L, K), each number for a pair of neighbors twice."""
    cosines, sines = rotations(places_L3[None], widths, THETA)
    return cosines[0].repeat_interleave(2, dim=-1), sines[0].repeat_interleave(2, dim=-1)
