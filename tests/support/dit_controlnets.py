"""Tiny random ControlNets for SD3 and Z-Image and their files, with formulas of this file alone for the original layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3ControlNetModel, ZImageControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from tests.support import sd3_networks, zimage_networks
from tests.support.flux_networks import make_random

_SD3_SHARED = ("attention_head_dim", "num_attention_heads", "pooled_projection_dim", "caption_projection_dim")
LARGE: dict[str, Any] = {"attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}
"""Changes to the tiny SD3 for Stability's ControlNets: without norms nothing tells how wide a head is, and published ones are 64 wide."""
SD3_KINDS: dict[str, dict[str, Any]] = {
    "InstantX": {"num_layers": 2, "joint_attention_dim": sd3_networks.T5_WIDTH, "pos_embed_max_size": 12, "qk_norm": "rms_norm"},
    "inpainting": {"num_layers": 2, "joint_attention_dim": sd3_networks.T5_WIDTH, "pos_embed_max_size": 12, "qk_norm": "rms_norm",
                   "extra_conditioning_channels": 1},
    "Stability": {"num_layers": 2, "joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False},
}  # fmt: skip
ZIMAGE_KINDS: dict[str, dict[str, Any]] = {
    "1.0": {"control_in_dim": 16},
    "2.0": {"control_in_dim": 33, "control_refiner_layers_places": [0, 1], "add_control_noise_refiner": "control_layers"},
    "2.1": {"control_in_dim": 33, "control_refiner_layers_places": [0, 1], "add_control_noise_refiner": "control_noise_refiner"},
}
"""The places of three layers: 0, 1 and 2, or of one: 0."""


def make_sd3_controlnet(kind: str, seed: int = 5) -> Any:
    """Its last layers, zero in a new network, are random too."""
    denoiser = {**sd3_networks.CONFIG, **(LARGE if kind == "Stability" else {})}
    config = {"sample_size": 16, **{name: denoiser[name] for name in _SD3_SHARED}, **SD3_KINDS[kind]}
    return make_random(lambda: SD3ControlNetModel(**config), seed)


def stability_tensors(controlnet: Any, control_type: int) -> dict[str, Tensor]:
    """Stability's names: blocks as in its own transformer, embedders as in diffusers."""
    made: dict[str, Tensor] = {"control_type": torch.tensor(control_type)}
    sources = dict(controlnet.state_dict())
    for number in range(controlnet.config.num_layers):
        block = f"transformer_blocks.{number}"
        for end in ("weight", "bias"):
            made[f"{block}.attn.qkv.{end}"] = torch.cat([sources.pop(f"{block}.attn.{name}.{end}") for name in ("to_q", "to_k", "to_v")])
            for original, ours in (("attn.proj", "attn.to_out.0"), ("mlp.fc1", "ff.net.0.proj"), ("mlp.fc2", "ff.net.2"),
                                   ("adaLN_modulation.1", "norm1.linear")):  # fmt: skip
                made[f"{block}.{original}.{end}"] = sources.pop(f"{block}.{ours}.{end}")
    return made | sources


def make_zimage_controlnet(kind: str, num_layers: int = 3, seed: int = 5) -> Any:
    shared = {name: zimage_networks.CONFIG[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    places = list(range(num_layers))
    return make_random(lambda: ZImageControlNetModel(control_layers_places=places, **shared, **ZIMAGE_KINDS[kind]), seed)


def fused_tensors(controlnet: Any) -> dict[str, Tensor]:
    """With the names of the denoiser's original files."""
    made: dict[str, Tensor] = {}
    sources = dict(controlnet.state_dict())
    for key in [key for key in sources if ".attention.to_q." in key]:
        made[key.replace("to_q", "qkv")] = torch.cat([sources.pop(key.replace("to_q", name)) for name in ("to_q", "to_k", "to_v")])
    for key, tensor in sources.items():
        for ours, original in ((".to_out.0.", ".out."), (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm.")):
            key = key.replace(f".attention{ours}", f".attention{original}")
        made[key] = tensor
    return made


def write_controlnet(path: Path, tensors: Any, prefix: str = "") -> Path:
    save_file({prefix + key: tensor.contiguous().clone() for key, tensor in dict(tensors).items()}, path)
    return path
