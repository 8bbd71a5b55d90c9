"""ControlNets for Flux.1 in files: InstantX's, Shakker's and alimama's (diffusers' names) and XLabs' (original names). Reads names and shapes.

controlnet_blocks.0, controlnet_x_embedder, transformer_blocks.0 ..                   the same
pos_embed_input, input_hint_block.0, .2 .. .14, double_blocks.0.img_attn.qkv ..       controlnet_x_embedder, input_hint_block.conv_in ..
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers import FluxControlNetModel

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.flux.identify import PLAIN_INPUTS, count_blocks, rope_widths
from backend.families.flux.key_map import flux_key_map
from backend.families.key_map import KeyMap
from backend.nn.flux_controlnet import build_library_network
from backend.state_dict import build_empty

_PREFIXES = ("", "controlnet.", "control_model.")
_LIBRARY_MARK, _XLABS_MARK = "controlnet_x_embedder.weight", "pos_embed_input.weight"
_HINT_LAYERS = ("conv_in", *(f"blocks.{number}" for number in range(6)), "conv_out")
"""The library's names of XLabs' convolutions, which are numbered 0, 2 .. 14 there."""
_HINT_CHANNELS = 16
MASK_INPUTS = 4
"""Per token of the hint: one for each latent."""


def find_flux_controlnet(keys: Collection[str]) -> Part | None:
    """A ControlNet for Flux.1; None for other files."""
    for prefix in _PREFIXES:
        if prefix + "controlnet_blocks.0.weight" in keys:
            for mark, first, layout in (
                (_LIBRARY_MARK, "transformer_blocks.0.attn.norm_k.weight", Layout.DIFFUSERS),
                (_XLABS_MARK, "double_blocks.0.img_attn.norm.key_norm.scale", Layout.LDM),
            ):
                if prefix + mark in keys and prefix + first in keys:
                    return Part(prefix, layout)
    return None


def build_flux_controlnet(file: TensorFile, part: Part) -> FluxControlNetModel:
    """The network without weights. Raises: CheckpointError for one that lacks layers, or has inputs of an unknown kind."""
    shapes = {key.removeprefix(part.prefix): info.shape for key, info in file.infos.items() if key.startswith(part.prefix)}
    config = _read_library(file, shapes) if part.layout is Layout.DIFFUSERS else _read_xlabs(file, shapes)
    return build_empty(lambda: build_library_network(config, shapes[_LIBRARY_MARK if part.layout is Layout.DIFFUSERS else _XLABS_MARK][1]))


def _read_library(file: TensorFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embed = "time_text_embed"
    config = _config(
        file, shapes, head_width=shapes["transformer_blocks.0.attn.norm_k.weight"][0], image_in="x_embedder.weight",
        text_in="context_embedder.weight",
        pooled_in=f"{embed}.text_embedder.linear_1.weight", guidance_in=f"{embed}.guidance_embedder.linear_1.weight", hint_in=_LIBRARY_MARK,
        double="transformer_blocks.", single="single_transformer_blocks.",
    )  # fmt: skip
    modes = shapes.get("controlnet_mode_embedder.weight")
    return config | {"num_mode": None if modes is None else modes[0]}


def _read_xlabs(file: TensorFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    config = _config(
        file, shapes, head_width=shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0], image_in="img_in.weight", text_in="txt_in.weight",
        pooled_in="vector_in.in_layer.weight", guidance_in="guidance_in.in_layer.weight", hint_in=_XLABS_MARK, double="double_blocks.",
        single="single_blocks.",
    )  # fmt: skip
    if shapes.get("input_hint_block.0.weight", ())[:1] != (_HINT_CHANNELS,):
        raise CheckpointError(
            f"{file.path.name}: is a ControlNet for Flux.1 that reads its hint in an unknown way (input_hint_block.0 is "
            f"{shapes.get('input_hint_block.0.weight', 'missing')}). Use one by InstantX, Shakker or XLabs."
        )
    return config | {"patch_size": 2, "conditioning_embedding_channels": _HINT_CHANNELS}


def _config(
    file: TensorFile, shapes: Mapping[str, tuple[int, ...]], *, head_width: int, image_in: str, text_in: str, pooled_in: str, guidance_in: str,
    hint_in: str, double: str, single: str,
) -> dict[str, Any]:  # fmt: skip
    missing = [key for key in (image_in, text_in, pooled_in, hint_in) if len(shapes.get(key, ())) != 2]
    if missing:
        raise CheckpointError(f"{file.path.name}: its ControlNet for Flux.1 lacks {missing[0]}. The file is incomplete; download it again.")
    (width, inputs), hint_inputs = shapes[image_in], shapes[hint_in][1]
    known = (PLAIN_INPUTS, PLAIN_INPUTS + MASK_INPUTS) if hint_in == _LIBRARY_MARK else (PLAIN_INPUTS,)
    if inputs != PLAIN_INPUTS or hint_inputs not in known or head_width < 8 or head_width % 2 or width % head_width:
        raise CheckpointError(
            f"{file.path.name}: is a ControlNet for Flux.1 with {inputs} inputs per token, {hint_inputs} per token of the hint, and heads "
            f"{head_width} of {width} wide. Supported are {PLAIN_INPUTS} of both (InstantX, Shakker, XLabs), and {PLAIN_INPUTS + MASK_INPUTS} of "
            "the hint (alimama, for inpainting)."
        )
    return {
        "in_channels": inputs,
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": shapes[text_in][1],
        "pooled_projection_dim": shapes[pooled_in][1],
        "guidance_embeds": guidance_in in shapes,
        "axes_dims_rope": rope_widths(head_width),
    }


def flux_controlnet_key_map(network: FluxControlNetModel) -> KeyMap:
    """XLabs' names."""
    base = flux_key_map(network)
    hint = {f"input_hint_block.{name}": f"input_hint_block.{2 * number}" for number, name in enumerate(_HINT_LAYERS)}
    return KeyMap(modules={**base.modules, **hint, "controlnet_x_embedder": "pos_embed_input"}, rows=base.rows, respelled=base.respelled)
