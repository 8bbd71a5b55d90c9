"""Tiny random ControlNets for Flux.1 and their files: InstantX's and Shakker's with diffusers' names, XLabs' with the original ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from tests.support.flux_networks import CONFIG, make_random, original_tensors

KINDS: dict[str, dict[str, Any]] = {
    "InstantX": {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True},
    "Union": {"num_layers": 2, "num_single_layers": 0, "guidance_embeds": True, "num_mode": 7},
    "XLabs": {"num_layers": 2, "num_single_layers": 0, "guidance_embeds": True, "patch_size": 2, "conditioning_embedding_channels": 16},
}


def make_controlnet(kind: str, seed: int = 5) -> FluxControlNetModel:
    """Its last layers, zero in a new network, are random too."""
    config = {name: value for name, value in CONFIG.items() if name != "out_channels"}
    controlnet = make_random(lambda: FluxControlNetModel(**{**config, **KINDS[kind]}), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_", "input_hint_block.conv_out")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return controlnet  # type: ignore[no-any-return]


def xlabs_tensors(controlnet: FluxControlNetModel) -> dict[str, Tensor]:
    """The original names: blocks as in Flux's own files, convolutions numbered with the activations between them."""
    sources = dict(controlnet.state_dict())
    layers = ["conv_in", *(f"blocks.{number}" for number in range(6)), "conv_out"]
    made = {
        f"input_hint_block.{2 * number}.{end}": sources.pop(f"input_hint_block.{layer}.{end}")
        for number, layer in enumerate(layers)
        for end in ("weight", "bias")
    }
    for end in ("weight", "bias"):
        made[f"pos_embed_input.{end}"] = sources.pop(f"controlnet_x_embedder.{end}")
    made |= {name: sources.pop(name) for name in [name for name in sources if name.startswith("controlnet_blocks.")]}
    return made | original_tensors(_Part(controlnet, sources))  # type: ignore[arg-type]


class _Part:
    """What `original_tensors` reads of a network."""

    def __init__(self, controlnet: FluxControlNetModel, tensors: dict[str, Tensor]) -> None:
        width = controlnet.inner_dim
        ends = {
            "proj_out.weight": torch.zeros(1),
            "norm_out.linear.weight": torch.zeros(2 * width, 1),
            "norm_out.linear.bias": torch.zeros(2 * width),
        }
        self.config, self._tensors = controlnet.config, {**tensors, **ends, "proj_out.bias": torch.zeros(1)}

    def state_dict(self) -> dict[str, Tensor]:
        return self._tensors


def write_flux_controlnet(path: Path, controlnet: FluxControlNetModel, kind: str, prefix: str = "") -> Path:
    tensors = xlabs_tensors(controlnet) if kind == "XLabs" else dict(controlnet.state_dict())
    tensors = {prefix + key: tensor.contiguous().clone() for key, tensor in tensors.items() if not key.startswith("final_layer.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
