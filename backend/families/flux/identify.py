"""Finds Flux.1 transformers in files, with their kind and the arguments for building them. Reads names and shapes only.

Kinds by shape: "dev" (takes distilled guidance; also Krea-dev and Kontext, which have its shapes), "schnell" (takes none), "fill" (384 inputs per
token: picture, masked picture and mask), "control" (128: picture, and a picture of edges or depth).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser

LATENT_CHANNELS, CELL = 16, 2
PLAIN_INPUTS, CONTROL_INPUTS, FILL_INPUTS = 64, 128, 384
DEV, SCHNELL, FILL, CONTROL = "dev", "schnell", "fill", "control"

_ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
_DIFFUSERS_PREFIXES = ("transformer.", "model.diffusion_model.", "")
_NORMS = ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.weight")
_RELATIVES = ((("early_stream_modulations.",), "Flux.3"),)
_CONTROLNET_MARKS = ("controlnet_blocks.", "controlnet_x_embedder.", "controlnet_single_blocks.", "input_hint_block.")


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of the tensors that determine the shape, in one layout."""

    image_in: str
    text_in: str
    vector_in: str
    guidance_in: str
    out: str
    norms: tuple[str, ...]
    double: str
    single: str


_ORIGINAL = _Names(
    "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "guidance_in.in_layer.weight", "final_layer.linear.weight", _NORMS,
    "double_blocks.", "single_blocks.",
)  # fmt: skip
_DIFFUSERS = _Names(
    "x_embedder.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight",
    "time_text_embed.guidance_embedder.linear_1.weight", "proj_out.weight", ("transformer_blocks.0.attn.norm_k.weight",),
    "transformer_blocks.", "single_transformer_blocks.",
)  # fmt: skip


def identify_flux(file: TensorFile) -> tuple[str, FoundDenoiser] | None:
    """The kind of Flux.1 in the file and its description. Raises: CheckpointError for unsupported relatives, which the message names."""
    for layout, names, prefixes in ((Layout.LDM, _ORIGINAL, _ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, _DIFFUSERS_PREFIXES)):
        for prefix in prefixes:
            if not _is_flux_like(file, prefix, names):
                continue
            shapes = {key.removeprefix(prefix): info.shape for key, info in file.infos.items() if key.startswith(prefix)}
            if any(key.startswith(_CONTROLNET_MARKS) for key in shapes):
                return None
            _refuse_relatives(file, shapes)
            return _describe(file, Part(prefix, layout), shapes, names)
    return None


def _is_flux_like(file: TensorFile, prefix: str, names: _Names) -> bool:
    """Whether it has the blocks of Flux or a relative. SD3 in diffusers' layout has no single blocks."""
    has_norm = any(prefix + norm in file.infos for norm in names.norms)
    return has_norm and any(key.startswith(prefix + names.single) for key in file.infos)


def _refuse_relatives(file: TensorFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for marks, title in _RELATIVES:
        if any(key.startswith(marks) for key in shapes):
            raise CheckpointError(
                f"{file.path.name}: is {title}. This is not supported; use a Flux.1 model (dev, Krea-dev, Kontext, schnell or Fill)."
            )


def _describe(file: TensorFile, part: Part, shapes: Mapping[str, tuple[int, ...]], names: _Names) -> tuple[str, FoundDenoiser]:
    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise CheckpointError(
                f"{file.path.name}: looks like Flux.1, but lacks {part.prefix}{key}. The file is incomplete: download it again, or convert it again "
                "from its source."
            )
        return shapes[key]

    width, inputs = shape(names.image_in)
    head_width = next(shapes[norm][0] for norm in names.norms if norm in shapes)
    has_guidance = names.guidance_in in shapes
    if inputs not in (PLAIN_INPUTS, CONTROL_INPUTS, FILL_INPUTS) or head_width < 8 or head_width % 2 or width % head_width:
        raise CheckpointError(
            f"{file.path.name}: looks like Flux.1, but has {inputs} inputs per token, width {width} and heads {head_width} wide. "
            "No such model is known; check that you downloaded the right file."
        )
    config: dict[str, Any] = {
        "in_channels": inputs,
        "out_channels": shape(names.out)[0],
        "num_layers": count_blocks(shapes, names.double),
        "num_single_layers": count_blocks(shapes, names.single),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shape(names.text_in)[1],
        "pooled_projection_dim": shape(names.vector_in)[1],
        "guidance_embeds": has_guidance,
        "axes_dims_rope": rope_widths(head_width),
    }
    kind = {FILL_INPUTS: FILL, CONTROL_INPUTS: CONTROL}.get(inputs, DEV if has_guidance else SCHNELL)
    return kind, FoundDenoiser(
        part=part,
        config=config,
        context_width=config["joint_attention_dim"],
        is_inpaint=kind == FILL,
        takes_control_picture=kind == CONTROL,
    )


def count_blocks(shapes: Mapping[str, tuple[int, ...]], start: str) -> int:
    """Number of consecutive blocks, from 0."""
    numbers = {key.removeprefix(start).partition(".")[0] for key in shapes if key.startswith(start)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def rope_widths(head_width: int) -> tuple[int, int, int]:
    """Split a head's width among the three position axes: an eighth for the picture's index, the rest for row and column.

    128 -> (16, 56, 56). For narrow heads, the first part grows until two even halves remain: 16 -> (4, 6, 6).
    """
    first = head_width // 8 + head_width // 8 % 2
    while (head_width - first) % 4 or first == 0:
        first += 2
    return first, (head_width - first) // 2, (head_width - first) // 2
