"""A UNet's configuration under the original code's names, for extensions that read `diffusion_model.config["model_channels"]`.

Names and order: Forge's UNet (`model_channels`, `channel_mult`, `transformer_depth` by resnet of the input blocks, `transformer_depth_output` from
the outermost level inward). Must not know weights or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

_HEAD_WIDTH = 64
_NAMES = frozenset(
    (
        *("model_channels", "channel_mult", "num_res_blocks", "dims", "num_classes", "adm_in_channels", "context_dim", "use_linear_in_transformer"),
        *("use_spatial_transformer", "transformer_depth", "transformer_depth_middle", "transformer_depth_output", "num_heads", "num_head_channels"),
    )
)


def add_original_names(unet: UNet2DConditionModel) -> None:
    """Add the original names to `unet.config`."""
    unet.register_to_config(**_read_original(unet))


def without_original_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The library's configuration, as `from_config` takes it."""
    return {name: value for name, value in config.items() if name not in _NAMES}


def _read_original(unet: UNet2DConditionModel) -> dict[str, Any]:
    config: Any = unet.config
    width = config.block_out_channels[0]
    vector_width = config.projection_class_embeddings_input_dim
    has_fixed_heads = isinstance(config.attention_head_dim, int)
    ways_in: list[Any] = list(unet.down_blocks)
    ways_out: list[Any] = list(unet.up_blocks)
    return {
        "model_channels": width,
        "channel_mult": [channels // width for channels in config.block_out_channels],
        "num_res_blocks": [len(block.resnets) for block in ways_in],
        "dims": 2,
        "num_classes": None if vector_width is None else "sequential",
        "adm_in_channels": vector_width,
        "context_dim": config.cross_attention_dim,
        "use_linear_in_transformer": config.use_linear_projection,
        "use_spatial_transformer": True,
        "transformer_depth": [depth for block in ways_in for depth in _depths(block)],
        "transformer_depth_middle": max(_depths(unet.mid_block)),
        "transformer_depth_output": [depth for block in reversed(ways_out) for depth in reversed(_depths(block))],
        "num_heads": config.attention_head_dim if has_fixed_heads else -1,
        "num_head_channels": -1 if has_fixed_heads else _HEAD_WIDTH,
    }


def _depths(block: nn.Module | None) -> list[int]:
    """Transformer blocks after each resnet of a block; 0 without attention."""
    if block is None:
        return [0]
    attentions: Any = getattr(block, "attentions", None) or []
    resnets: Any = block.resnets
    return [len(attention.transformer_blocks) for attention in attentions] or [0] * len(resnets)
