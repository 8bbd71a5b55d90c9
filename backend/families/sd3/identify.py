"""Finds SD3 and SD3.5 transformers in files, with the arguments for building them. Reads names and shapes only.

By shape: SD3 medium has no norms of queries and keys, SD3.5 has; SD3.5 medium has a second attention in its first blocks. SD3.5 large and large-turbo
have the same shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part

TITLE = "SD 3"
LATENT_CHANNELS, PATCH = 16, 2
HEAD_WIDTH = 64
"""Of every published model; read from the norms where there are any."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout. `marks`: all are in every file; `norm`, `dual`: with a block's number."""

    marks: tuple[str, ...]
    absent: tuple[str, ...]
    patch: str
    table: str
    text_in: str
    vector_in: str
    blocks: str
    norm: str
    dual: str


_ORIGINAL = _Names(
    marks=("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"),
    absent=(),
    patch="x_embedder.proj.weight",
    table="pos_embed",
    text_in="context_embedder.weight",
    vector_in="y_embedder.mlp.0.weight",
    blocks="joint_blocks.",
    norm="joint_blocks.0.x_block.attn.ln_q.weight",
    dual="joint_blocks.{}.x_block.attn2.qkv.weight",
)
_DIFFUSERS = _Names(
    marks=("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight", "time_text_embed.text_embedder.linear_1.weight"),
    absent=("single_transformer_blocks.",),
    patch="pos_embed.proj.weight",
    table="pos_embed.pos_embed",
    text_in="context_embedder.weight",
    vector_in="time_text_embed.text_embedder.linear_1.weight",
    blocks="transformer_blocks.",
    norm="transformer_blocks.0.attn.norm_q.weight",
    dual="transformer_blocks.{}.attn2.to_q.weight",
)
_CONTROLNET_MARKS = ("controlnet_blocks.", "pos_embed_input.")


def identify_sd3(file: TensorFile) -> FoundDenoiser | None:
    """The SD3 in the file. Raises: CheckpointError for a file that lacks what its shape is read from."""
    for layout, names, prefixes in ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES)):
        for prefix in prefixes:
            if not all(prefix + mark in file.infos for mark in names.marks):
                continue
            shapes = read_part(file, Part(prefix, layout), TITLE)
            if shapes.has_any(*names.absent) if names.absent else False:
                continue
            return None if shapes.has_any(*_CONTROLNET_MARKS) else _describe(shapes, names)
    return None


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, channels, *_ = shapes.find(names.patch, 4)
    head_width = shapes.find(names.norm, 1)[0] if names.norm in shapes else HEAD_WIDTH
    _, num_places, _ = shapes.find(names.table, 3)
    side = math.isqrt(num_places)
    if channels != LATENT_CHANNELS or side * side != num_places or width % head_width:
        raise shapes.refuse(f"{channels} latent channels, {num_places} positions and width {width}")
    num_layers = shapes.count_blocks(names.blocks)
    config: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": PATCH,
        "num_layers": num_layers,
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shapes.find(names.text_in)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes.find(names.vector_in)[1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(number for number in range(num_layers) if names.dual.format(number) in shapes),
        "qk_norm": "rms_norm" if names.norm in shapes else None,
    }
    return FoundDenoiser(part=shapes.part, config=config)
