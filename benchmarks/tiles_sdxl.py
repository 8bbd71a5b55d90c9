"""One row of a narrow network in SDXL's layout in tiles on two slots."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from backend.nn.unet_program import build_program
from benchmarks._tiles import make_tile_bench

WIDTH = 96


def make() -> tuple[Program, NetworkCall]:
    unet = UNet2DConditionModel(
        sample_size=96,
        block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(3, 6, 12),
        cross_attention_dim=512,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    unet.eval().requires_grad_(False)
    rows = {
        "x": torch.randn(1, 4, 96, 96),
        "timesteps": torch.tensor([500.0]),
        "context": torch.randn(1, 77, 512),
        "y": torch.randn(1, 2816),
    }
    return build_program(unet), NetworkCall(rows=rows)


BENCH = make_tile_bench(f"SDXL's layout at full depth, {WIDTH} to {4 * WIDTH} channels, 768x768", make, at_least="1.75x", num_rounds=5)
