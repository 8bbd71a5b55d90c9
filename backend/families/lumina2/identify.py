"""Finds Lumina2 transformers (Lumina-Image-2.0, NetaYume) in files, with the arguments for building them. Reads names and shapes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part

TITLE = "Lumina2"
LATENT_CHANNELS, CELL = 16, 2


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout. `mark` is in no relative."""

    mark: str
    norm: str
    keys: str
    mlp: str
    text_in: str


_ORIGINAL = _Names(
    "layers.0.adaLN_modulation.1.weight", "layers.0.attention.k_norm.weight", "layers.0.attention.qkv.weight", "layers.0.feed_forward.w1.weight",
    "cap_embedder.1.weight",
)  # fmt: skip
_DIFFUSERS = _Names(
    "time_caption_embed.caption_embedder.1.weight", "layers.0.attn.norm_k.weight", "layers.0.attn.to_k.weight",
    "layers.0.feed_forward.linear_1.weight", "time_caption_embed.caption_embedder.1.weight",
)  # fmt: skip
_LAYOUTS = ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES))


def identify_lumina2(file: TensorFile) -> FoundDenoiser | None:
    """The Lumina2 in the file. Raises: CheckpointError for a file that lacks what its shape is read from."""
    for layout, names, prefixes in _LAYOUTS:
        for prefix in prefixes:
            if all(prefix + name in file.infos for name in (names.mark, names.norm)):
                return _describe(read_part(file, Part(prefix, layout), TITLE), names)
    return None


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, inputs = shapes.find("x_embedder.weight")
    (head_width,) = shapes.find(names.norm, 1)
    rows, inner_width = shapes.find(names.keys)[0], shapes.find(names.mlp)[0]
    key_width = rows if shapes.part.layout is Layout.DIFFUSERS else (rows - width) // 2
    is_sound = head_width % 6 == 0 and width % head_width == 0 and key_width > 0 and key_width % head_width == 0 and width % key_width == 0
    if inputs != LATENT_CHANNELS * CELL**2 or not is_sound or inner_width < 4 * width:
        raise shapes.refuse(f"{inputs} inputs per token, width {width}, keys {key_width} and heads {head_width} wide, an MLP {inner_width} wide")
    config: dict[str, Any] = {
        "in_channels": LATENT_CHANNELS,
        "hidden_size": width,
        "num_layers": shapes.count_blocks("layers."),
        "num_refiner_layers": shapes.count_blocks("noise_refiner."),
        "num_attention_heads": width // head_width,
        "num_kv_heads": key_width // head_width,
        "multiple_of": inner_width,
        "axes_dim_rope": (head_width // 3,) * 3,
        "cap_feat_dim": shapes.find(names.text_in)[1],
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=config["cap_feat_dim"])
