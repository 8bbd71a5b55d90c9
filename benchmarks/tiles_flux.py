"""One row of a small network in Flux.1's layout in tiles on two slots."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

from backend.families.flux.program import build_flux_program
from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from benchmarks._tiles import make_tile_bench

NUM_HEADS = 4
TEXT_TOKENS = 512


def make() -> tuple[Program, NetworkCall]:
    network = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=NUM_HEADS, joint_attention_dim=256,
        pooled_projection_dim=64, guidance_embeds=True,
    )  # fmt: skip
    network.eval().requires_grad_(False)
    rows = {
        "x": torch.randn(1, 16, 128, 128),
        "timesteps": torch.tensor([0.5]),
        "context": torch.randn(1, TEXT_TOKENS, 256),
        "y": torch.randn(1, 64),
        "guidance": torch.tensor([3.5]),
    }
    return build_flux_program(network), NetworkCall(rows=rows)


BENCH = make_tile_bench(
    f"Flux.1's layout, {NUM_HEADS} heads of 128, 2 double and 4 single blocks, 4096 picture and {TEXT_TOKENS} text tokens", make,
    at_least="1.85x", num_rounds=3,
)  # fmt: skip
