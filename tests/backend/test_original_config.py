"""Reference: the published configurations of Stable Diffusion 1.x and SDXL (v1-inference.yaml, sd_xl_base.yaml), Forge's flat lists of depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from backend.original_config import add_original_names, without_original_names

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        SD15,
        {
            "model_channels": 320,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "context_dim": 768,
            "num_heads": 8,
            "num_head_channels": -1,
            "num_classes": None,
            "adm_in_channels": None,
            "use_linear_in_transformer": False,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        },
    ),
    "sdxl": (
        SDXL,
        {
            "model_channels": 320,
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "context_dim": 2048,
            "num_heads": -1,
            "num_head_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "use_linear_in_transformer": True,
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        },
    ),
}


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_the_original_names_are_added_to_the_librarys(family: str) -> None:
    arguments, published = PUBLISHED[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**arguments)
    before = dict(unet.config)
    add_original_names(unet)
    assert {name: unet.config[name] for name in published} == published
    assert unet.config.model_channels == 320
    assert without_original_names(unet.config) == before
