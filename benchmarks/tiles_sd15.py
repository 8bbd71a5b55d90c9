"""One row of SD1.5 at full width in tiles on two slots."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from backend.nn.unet_program import build_program
from benchmarks._tiles import make_tile_bench


def make() -> tuple[Program, NetworkCall]:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval().requires_grad_(False)
    rows = {"x": torch.randn(1, 4, 64, 64), "timesteps": torch.tensor([500.0]), "context": torch.randn(1, 77, 768)}
    return build_program(unet), NetworkCall(rows=rows)


BENCH = make_tile_bench(
    "SD1.5 (320 to 1280 channels), 512x512", make, at_least="1.75x, and 1.45x if one slot has speed 0.6", num_rounds=3, slowed=True
)
