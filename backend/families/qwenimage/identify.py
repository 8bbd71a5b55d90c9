"""Finds Qwen-Image transformers in files, with the arguments for building them. Reads names, shapes, and one word of the file's name.

The original files have diffusers' names. Editing models have the same shapes: their file names tell them. Those of November 2025 on (2511) give the
tokens of reference pictures the modulation of a clean picture; a tensor without weights marks them in some files, the file's name in others.
"""

from __future__ import annotations

from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import DIFFUSERS_PREFIXES, ORIGINAL_PREFIXES, FileShapes, read_part
from backend.families.flux.identify import rope_widths
from backend.families.qwen_vae import LATENT

TITLE = "Qwen-Image"
CELL = 2
INPUTS = LATENT.channels * CELL**2
_MARKS = ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")
_CONTROLNET_MARKS = ("controlnet_blocks.", "controlnet_x_embedder.")
CLEAN_REFERENCES = "__index_timestep_zero__"
_CLEAN_NAMES = ("2511",)
_RELATIVES = (
    (("txt_in.text_norm.weight",), "Qwen-Image-2.1"),
    (("txt_norm.weight", "time_text_embed.addition_t_embedding.weight"), "Qwen-Image-Layered"),
    (("txt_norm.weight", "transformer_blocks.0.attn.to_qkv.qweight"), "a Qwen-Image in Nunchaku's 4-bit format"),
)


def identify_qwenimage(file: TensorFile) -> FoundDenoiser | None:
    """The Qwen-Image in the file. Raises: CheckpointError for an unsupported relative, and for a file that lacks what its shape is read from."""
    for prefix in dict.fromkeys((*ORIGINAL_PREFIXES, *DIFFUSERS_PREFIXES)):
        for marks, title in _RELATIVES:
            if all(prefix + mark in file.infos for mark in marks):
                raise CheckpointError(f"{file.path.name}: is {title}. This is not supported; use Qwen-Image, or Qwen-Image-Edit.")
        if all(prefix + mark in file.infos for mark in _MARKS):
            layout = Layout.DIFFUSERS if prefix == "transformer." else Layout.LDM
            shapes = read_part(file, Part(prefix, layout), TITLE)
            return None if shapes.has_any(*_CONTROLNET_MARKS) else _describe(shapes)
    return None


def _describe(shapes: FileShapes) -> FoundDenoiser:
    width, inputs = shapes.find("img_in.weight")
    (head_width,) = shapes.find("transformer_blocks.0.attn.norm_k.weight", 1)
    outputs, _ = shapes.find("proj_out.weight")
    if (inputs, outputs) != (INPUTS, INPUTS) or head_width < 8 or head_width % 2 or width % head_width:
        raise shapes.refuse(f"{inputs} inputs and {outputs} outputs per token, width {width} and heads {head_width} wide")
    stem = shapes.file.path.stem.lower()
    config: dict[str, Any] = {
        "in_channels": inputs,
        "out_channels": LATENT.channels,
        "num_layers": shapes.count_blocks("transformer_blocks."),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shapes.find("txt_in.weight")[1],
        "axes_dims_rope": rope_widths(head_width),
        "zero_cond_t": CLEAN_REFERENCES in shapes or any(name in stem for name in _CLEAN_NAMES),
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=config["joint_attention_dim"])
