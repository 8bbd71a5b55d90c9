"""Tiny random Flux.1 networks from diffusers, and their weights in the original layout, by formulas of this file alone: the tested key map is
not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from tests.support.kept import kept

CLIP_WIDTH = 64
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": CLIP_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
WIDTH = 48
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@kept
def make_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """All weights random, including norms and biases, so that a swapped key is noticed."""
    return make_random(lambda: FluxTransformer2DModel(**{**CONFIG, **changes}), seed)


@kept
def make_vae(seed: int = 1, **changes: Any) -> AutoencoderKL:
    return make_random(lambda: AutoencoderKL(**{**VAE_CONFIG, **changes}), seed)


def make_random(build: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = build()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    return network.eval().requires_grad_(False)


def original_tensors(flux: Any, prefix: str = "", others: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A transformer's weights in Black Forest Labs' layout. `others`: names of further weights of a relative, ours -> original."""
    sources = dict(flux.state_dict())
    others_made = {original: sources.pop(ours) for ours, original in (others or {}).items()}
    made: dict[str, Tensor] = dict(others_made)

    def move(name: str, *ours: str, ends: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))) -> None:
        for end, other in ends:
            if f"{ours[0]}.{end}" in sources:
                made[f"{name}.{other}"] = torch.cat([sources.pop(f"{our}.{end}") for our in ours])

    scale = (("weight", "scale"),)
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for original, ours in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"), ("vector_in", "text_embedder")):
        move(f"{original}.in_layer", f"time_text_embed.{ours}.linear_1")
        move(f"{original}.out_layer", f"time_text_embed.{ours}.linear_2")
    for number in range(flux.config.num_layers):
        old, new = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for stream, qkv, norms, out, mod, mlp in (
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "norm1_context", "ff_context"),
        ):
            move(f"{new}.{stream}_mod.lin", f"{old}.{mod}.linear")
            move(f"{new}.{stream}_attn.qkv", *(f"{old}.attn.{name}" for name in qkv))
            move(f"{new}.{stream}_attn.norm.query_norm", f"{old}.attn.{norms[0]}", ends=scale)
            move(f"{new}.{stream}_attn.norm.key_norm", f"{old}.attn.{norms[1]}", ends=scale)
            move(f"{new}.{stream}_attn.proj", f"{old}.attn.{out}")
            move(f"{new}.{stream}_mlp.0", f"{old}.{mlp}.net.0.proj")
            move(f"{new}.{stream}_mlp.2", f"{old}.{mlp}.net.2")
    for number in range(flux.config.num_single_layers):
        old, new = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        move(f"{new}.linear1", f"{old}.attn.to_q", f"{old}.attn.to_k", f"{old}.attn.to_v", f"{old}.proj_mlp")
        move(f"{new}.linear2", f"{old}.proj_out")
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.norm.query_norm", f"{old}.attn.norm_q", ends=scale)
        move(f"{new}.norm.key_norm", f"{old}.attn.norm_k", ends=scale)
    move("final_layer.linear", "proj_out")
    for end in ("weight", "bias") if "norm_out.linear.weight" in sources else ():
        scales, shifts = sources.pop(f"norm_out.linear.{end}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shifts, scales])
    assert not sources, sorted(sources)
    return {prefix + key: tensor.contiguous() for key, tensor in made.items()}
