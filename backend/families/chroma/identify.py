"""Finds Chroma transformers in files, with the arguments for building them. Reads names and shapes only.

Chroma has Flux.1's blocks without their modulation matrices; a net of its own, the distilled guidance layer, makes all modulations at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part
from backend.families.flux.identify import rope_widths

TITLE = "Chroma"
INPUTS = 64
_NET = "distilled_guidance_layer."
_RADIANCE_MARKS = ("nerf_image_embedder.", "nerf_blocks.", "nerf_final_layer", "img_in_patch.")


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout."""

    image_in: str
    text_in: str
    norms: tuple[str, ...]
    double: str
    single: str
    net_layer: str


_ORIGINAL = _Names(
    "img_in.weight", "txt_in.weight", tuple(f"double_blocks.0.img_attn.norm.key_norm.{end}" for end in ("scale", "weight")), "double_blocks.",
    "single_blocks.", f"{_NET}layers.0.in_layer.weight",
)  # fmt: skip
_DIFFUSERS = _Names(
    "x_embedder.weight", "context_embedder.weight", ("transformer_blocks.0.attn.norm_k.weight",), "transformer_blocks.", "single_transformer_blocks.",
    f"{_NET}layers.0.linear_1.weight",
)  # fmt: skip
_LAYOUTS = ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES))


def identify_chroma(file: TensorFile) -> FoundDenoiser | None:
    """The Chroma in the file. Raises: CheckpointError for Chroma Radiance, and for a file that lacks what its shape is read from."""
    for layout, names, prefixes in _LAYOUTS:
        for prefix in prefixes:
            if f"{prefix}{_NET}in_proj.weight" not in file.infos or not any(prefix + norm in file.infos for norm in names.norms):
                continue
            shapes = read_part(file, Part(prefix, layout), TITLE)
            _refuse_radiance(shapes)
            return _describe(shapes, names)
    return None


def _refuse_radiance(shapes: FileShapes) -> None:
    if shapes.has_any(*_RADIANCE_MARKS):
        raise CheckpointError(
            f"{shapes.file.path.name}: is Chroma Radiance, which works on pixels. This is not supported; use Chroma1-HD or Chroma1-Base."
        )


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, inputs = shapes.find(names.image_in)
    (head_width,) = shapes.find(next(norm for norm in names.norms if norm in shapes), 1)
    if inputs != INPUTS or head_width < 8 or head_width % 2 or width % head_width:
        raise shapes.refuse(f"{inputs} inputs per token, width {width} and heads {head_width} wide")
    net_width, net_inputs = shapes.find(f"{_NET}in_proj.weight")
    shapes.find(names.net_layer)
    if net_inputs % 4:
        raise shapes.refuse(f"{net_inputs} inputs of the distilled guidance layer")
    config: dict[str, Any] = {
        "in_channels": inputs,
        "num_layers": shapes.count_blocks(names.double),
        "num_single_layers": shapes.count_blocks(names.single),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shapes.find(names.text_in)[1],
        "axes_dims_rope": rope_widths(head_width),
        "approximator_num_channels": net_inputs,
        "approximator_hidden_dim": net_width,
        "approximator_layers": shapes.count_blocks(f"{_NET}layers."),
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=config["joint_attention_dim"])
