"""ControlNets for SD3 and SD3.5 in files: InstantX's and alimama's (diffusers' names), Stability's (its own names, or diffusers').

pos_embed.proj, pos_embed_input.proj, transformer_blocks.0.attn.add_q_proj, controlnet_blocks.0         joint blocks
pos_embed_input.proj, transformer_blocks.0.attn.qkv, .mlp.fc1, .adaLN_modulation.1, controlnet_blocks.0  blocks without text

Reads names and shapes, and Stability's `control_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from diffusers import SD3ControlNetModel
from torch import nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.file_shapes import FileShapes, read_part
from backend.families.flux.key_map import share_rows
from backend.families.key_map import KeyMap, OriginalPlace
from backend.families.sd3.controlnet import build_library_network
from backend.families.sd3.identify import HEAD_WIDTH, LATENT_CHANNELS
from backend.families.sd3.key_map import ENDS
from backend.state_dict import build_empty

TITLE = "a ControlNet for SD 3"
_PREFIXES = ("", "controlnet.", "control_model.")
_HINT, _FIRST = "pos_embed_input.proj.weight", "controlnet_blocks.0.weight"
_MARKS = ((Layout.LDM, "transformer_blocks.0.adaLN_modulation.1.weight"), (Layout.DIFFUSERS, "transformer_blocks.0.norm1.linear.weight"))
_KIND = "control_type"
_CANNY = 1
_BLOCK = {"norm1.linear": "adaLN_modulation.1", "attn.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def find_sd3_controlnet(keys: Collection[str]) -> Part | None:
    """A ControlNet for SD3 or SD3.5; None for other files."""
    for prefix in _PREFIXES:
        if prefix + _HINT in keys and prefix + _FIRST in keys:
            for layout, mark in _MARKS:
                if prefix + mark in keys:
                    return Part(prefix, layout)
    return None


def build_sd3_controlnet(file: TensorFile, part: Part) -> SD3ControlNetModel:
    """The network without weights. Raises: CheckpointError for one that lacks layers, or has inputs of an unknown kind."""
    shapes = read_part(file, part, TITLE)
    width, hint_channels, *_ = shapes.find(_HINT, 4)
    pooled = next((shapes.find(name)[1] for name in _pooled_names() if name in shapes), 0)
    head_width = shapes.find("transformer_blocks.0.attn.norm_q.weight", 1)[0] if "transformer_blocks.0.attn.norm_q.weight" in shapes else HEAD_WIDTH
    reads_text = "context_embedder.weight" in shapes
    extra = hint_channels - LATENT_CHANNELS
    if extra not in ((0, 1) if reads_text else (0,)) or width % head_width or pooled in (0, width):
        raise shapes.refuse(f"{hint_channels} channels of the hint, {pooled} numbers of pooled text and heads {head_width} of {width} wide")
    config: dict[str, Any] = {
        "num_layers": shapes.count_blocks("transformer_blocks."),
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "pooled_projection_dim": pooled,
        "extra_conditioning_channels": extra,
        "caption_projection_dim": width,
        "force_zeros_for_pooled_projection": reads_text,
    }
    config |= _read_text_part(shapes) if reads_text else {"joint_attention_dim": None, "use_pos_embed": False}
    return build_empty(lambda: build_library_network(config))


def _read_text_part(shapes: FileShapes) -> dict[str, Any]:
    _, num_places, _ = shapes.find("pos_embed.pos_embed", 3)
    side = math.isqrt(num_places)
    if side * side != num_places:
        raise shapes.refuse(f"{num_places} positions")
    count = shapes.count_blocks("transformer_blocks.")
    return {
        "joint_attention_dim": shapes.find("context_embedder.weight")[1],
        "pos_embed_max_size": side,
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
        "dual_attention_layers": tuple(number for number in range(count) if f"transformer_blocks.{number}.attn2.to_q.weight" in shapes),
    }


def _pooled_names() -> tuple[str, str]:
    name = "time_text_embed.text_embedder.linear_1.weight"
    return name, f"{ENDS[name.removesuffix('.weight')]}.weight"


def sd3_controlnet_places(network: SD3ControlNetModel) -> Callable[[str], Sequence[OriginalPlace]]:
    """Function from our names to possible places in Stability's files. They spell the embedders in either way."""
    keys = _key_map(network)
    return lambda key: (*keys.places(key), OriginalPlace(key, None))


def _key_map(network: nn.Module) -> KeyMap:
    model: Any = network
    modules = {name: other for name, other in ENDS.items() if name.startswith("time_text_embed.")}
    rows = {}
    for number in range(len(model.transformer_blocks)):
        block = f"transformer_blocks.{number}"
        parts = share_rows([f"{block}.{name}" for name in _QKV], [model.inner_dim] * 3)
        rows.update(parts)
        modules.update(dict.fromkeys(parts, f"{block}.attn.qkv"))
        modules.update({f"{block}.{name}": f"{block}.{other}" for name, other in _BLOCK.items()})
    return KeyMap(modules=modules, rows=rows)


def is_for_canny(file: TensorFile, part: Part) -> bool:
    """Whether it is Stability's for edges, whose hints have another range. Files in diffusers' layout do not tell; their name does."""
    kind = file.infos.get(part.prefix + _KIND)
    if kind is not None and math.prod(kind.shape) == 1:
        return float(file.read(part.prefix + _KIND)) == _CANNY
    return "canny" in file.path.stem.lower()
