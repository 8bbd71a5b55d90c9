"""Finds Z-Image transformers in files, with the arguments for building them. Reads names and shapes only.

Lumina2 has the same names for much of it; its modulations have an activation before their matrix ("adaLN_modulation.1"), Z-Image's have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part

TITLE = "Z-Image"
LATENT_CHANNELS, CELL = 16, 2
_MARK = "layers.0.adaLN_modulation.0.weight"
_CONTROLNET_MARKS = ("control_layers.", "control_all_x_embedder.")
_OMNI_MARKS = ("siglip_embedder.", "siglip_refiner.")


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout."""

    picture_in: str
    norm: str


_ORIGINAL = _Names("x_embedder.weight", "layers.0.attention.q_norm.weight")
_DIFFUSERS = _Names("all_x_embedder.2-1.weight", "layers.0.attention.norm_q.weight")
_LAYOUTS = ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES))


def identify_zimage(file: TensorFile) -> FoundDenoiser | None:
    """The Z-Image in the file. Raises: CheckpointError for Z-Image Omni, and for a file that lacks what its shape is read from."""
    for layout, names, prefixes in _LAYOUTS:
        for prefix in prefixes:
            if not all(prefix + name in file.infos for name in (_MARK, names.norm)):
                continue
            shapes = read_part(file, Part(prefix, layout), TITLE)
            if shapes.has_any(*_CONTROLNET_MARKS):
                return None
            if shapes.has_any(*_OMNI_MARKS):
                raise CheckpointError(
                    f"{file.path.name}: is Z-Image Omni, which reads pictures. This is not supported; use Z-Image or Z-Image-Turbo."
                )
            return _describe(shapes, names)
    return None


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, inputs = shapes.find(names.picture_in)
    (head_width,) = shapes.find(names.norm, 1)
    if inputs != LATENT_CHANNELS * CELL**2 or head_width < 8 or head_width % 2 or width % head_width:
        raise shapes.refuse(f"{inputs} inputs per token, width {width} and heads {head_width} wide")
    config: dict[str, Any] = {
        "in_channels": LATENT_CHANNELS,
        "dim": width,
        "n_layers": shapes.count_blocks("layers."),
        "n_refiner_layers": shapes.count_blocks("noise_refiner."),
        "n_heads": width // head_width,
        "n_kv_heads": width // head_width,
        "cap_feat_dim": shapes.find("cap_embedder.1.weight")[1],
        "axes_dims": axis_widths(head_width),
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=config["cap_feat_dim"])


def axis_widths(head_width: int) -> list[int]:
    """A head's width among the three position axes: a quarter for the place in the text, the rest for row and column. 128 -> [32, 48, 48]."""
    first = head_width // 4 + head_width // 4 % 2
    while (head_width - first) % 4 or first == 0:
        first += 2
    return [first, (head_width - first) // 2, (head_width - first) // 2]
