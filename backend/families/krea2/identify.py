"""Finds Krea 2 transformers in files, with the arguments for building them. Reads names and shapes only; Raw and Turbo have the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part
from backend.families.qwen_vae import LATENT
from backend.families.zimage.identify import axis_widths

TITLE = "Krea 2"
CELL = 2
INPUTS = LATENT.channels * CELL**2


@dataclass(frozen=True, slots=True)
class _Names:
    """Names that determine the shape, in one layout. `key`, `norm`, `gate` end those of attention and MLP in a block."""

    picture_in: str
    time_in: str
    text_in: str
    fusion: str
    blocks: str
    key: str
    norm: str
    gate: str


_ORIGINAL = _Names(
    "first.weight", "tmlp.0.weight", "txtmlp.1.weight", "txtfusion.", "blocks.", "attn.wk.weight", "attn.qknorm.knorm.scale", "mlp.gate.weight"
)  # fmt: skip
_DIFFUSERS = _Names(
    "img_in.weight", "time_embed.linear_1.weight", "txt_in.linear_1.weight", "text_fusion.", "transformer_blocks.", "attn.to_k.weight",
    "attn.norm_k.weight", "ff.gate.weight",
)  # fmt: skip
_LAYOUTS = ((Layout.LDM, _ORIGINAL, ORIGINAL_PREFIXES), (Layout.DIFFUSERS, _DIFFUSERS, DIFFUSERS_PREFIXES))


def identify_krea2(file: TensorFile) -> FoundDenoiser | None:
    """The Krea 2 in the file. Raises: CheckpointError for a file that lacks what its shape is read from."""
    for layout, names, prefixes in _LAYOUTS:
        for prefix in prefixes:
            if all(prefix + name in file.infos for name in (f"{names.fusion}projector.weight", names.picture_in)):
                return _describe(read_part(file, Part(prefix, layout), TITLE), names)
    return None


def _describe(shapes: FileShapes, names: _Names) -> FoundDenoiser:
    width, inputs = shapes.find(names.picture_in)
    text_width = shapes.find(names.text_in)[1]
    (head_width,), (text_head_width,) = (shapes.find(f"{start}0.{names.norm}", 1) for start in (names.blocks, f"{names.fusion}layerwise_blocks."))
    is_even = all(whole % part == 0 for whole, part in ((width, head_width), (text_width, text_head_width)))
    if inputs != INPUTS or head_width < 8 or head_width % 2 or not is_even:
        raise shapes.refuse(
            f"{inputs} inputs per token, width {width} and heads {head_width} wide, text {text_width} and heads {text_head_width} wide"
        )
    num_taps = shapes.find(f"{names.fusion}projector.weight")[1]
    config: dict[str, Any] = {
        "in_channels": inputs,
        "num_layers": shapes.count_blocks(names.blocks),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "num_key_value_heads": shapes.find(f"{names.blocks}0.{names.key}")[0] // head_width,
        "intermediate_size": shapes.find(f"{names.blocks}0.{names.gate}")[0],
        "timestep_embed_dim": shapes.find(names.time_in)[1],
        "text_hidden_dim": text_width,
        "num_text_layers": num_taps,
        "text_num_attention_heads": text_width // text_head_width,
        "text_num_key_value_heads": shapes.find(f"{names.fusion}layerwise_blocks.0.{names.key}")[0] // text_head_width,
        "text_intermediate_size": shapes.find(f"{names.fusion}layerwise_blocks.0.{names.gate}")[0],
        "num_layerwise_text_blocks": shapes.count_blocks(f"{names.fusion}layerwise_blocks."),
        "num_refiner_text_blocks": shapes.count_blocks(f"{names.fusion}refiner_blocks."),
        "axes_dims_rope": axis_widths(head_width),
    }
    if not all(config[name] for name in ("num_key_value_heads", "text_num_key_value_heads")):
        raise shapes.refuse("keys narrower than a head")
    return FoundDenoiser(part=shapes.part, config=config, context_width=num_taps * text_width)
