"""Finds Flux.2 transformers in files, with the arguments for building them. Reads names and shapes only.

Flux.2 has Flux.1's names for its blocks, with modulations that all blocks of a kind share. dev takes distilled guidance and reads another text
encoder; klein's distilled and base models have the same shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part

TITLE = "Flux.2-klein"
LATENT_CHANNELS = 128
NUM_AXES = 4


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout."""

    mark: str
    image_in: str
    text_in: str
    time_in: str
    guidance_in: str
    norms: tuple[str, ...]
    mlp_out: str
    double: str
    single: str


_ORIGINAL = _Names(
    "double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "guidance_in.",
    tuple(f"double_blocks.0.img_attn.norm.key_norm.{end}" for end in ("scale", "weight")), "double_blocks.0.img_mlp.2.weight", "double_blocks.",
    "single_blocks.",
)  # fmt: skip
_DIFFUSERS = _Names(
    "double_stream_modulation_img.linear.weight", "x_embedder.weight", "context_embedder.weight",
    "time_guidance_embed.timestep_embedder.linear_1.weight", "time_guidance_embed.guidance_embedder.",
    ("transformer_blocks.0.attn.norm_k.weight",), "transformer_blocks.0.ff.linear_out.weight", "transformer_blocks.", "single_transformer_blocks.",
)  # fmt: skip
_LAYOUTS = ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES))


def identify_flux2(file: TensorFile) -> FoundDenoiser | None:
    """The Flux.2-klein in the file. Raises: CheckpointError for Flux.2-dev, and for a file that lacks what its shape is read from."""
    for layout, names, prefixes in _LAYOUTS:
        for prefix in prefixes:
            if prefix + names.mark not in file.infos or not any(prefix + norm in file.infos for norm in names.norms):
                continue
            shapes = read_part(file, Part(prefix, layout), TITLE)
            if shapes.has_any(names.guidance_in):
                raise CheckpointError(
                    f"{file.path.name}: is Flux.2-dev, whose text encoder (Mistral) is not supported. Use Flux.2-klein 4B or 9B, or a Flux.1 model."
                )
            return _describe(shapes, names)
    return None


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, inputs = shapes.find(names.image_in)
    (head_width,) = shapes.find(next(norm for norm in names.norms if norm in shapes), 1)
    if inputs != LATENT_CHANNELS or head_width < 8 or head_width % (2 * NUM_AXES) or width % head_width:
        raise shapes.refuse(f"{inputs} inputs per token, width {width} and heads {head_width} wide")
    mlp_width = shapes.find(names.mlp_out)[1]
    if int(width * (mlp_width / width)) != mlp_width:
        raise shapes.refuse(f"an MLP {mlp_width} wide for tokens {width} wide")
    config: dict[str, Any] = {
        "in_channels": inputs,
        "num_layers": shapes.count_blocks(names.double),
        "num_single_layers": shapes.count_blocks(names.single),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shapes.find(names.text_in)[1],
        "timestep_guidance_channels": shapes.find(names.time_in)[1],
        "mlp_ratio": mlp_width / width,
        "axes_dims_rope": (head_width // NUM_AXES,) * NUM_AXES,
        "guidance_embeds": False,
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=config["joint_attention_dim"])
