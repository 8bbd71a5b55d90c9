"""Tiny random files of what shows pictures to Flux.1: SigLIP, Redux, and XLabs' IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.support.flux_networks import CONFIG, WIDTH, make_random
from tests.support.ip_adapters import PROJECTED

SIGLIP_WIDTH, SIGLIP_SIDE_PX = 32, 24
NUM_TOKENS = 4


def make_siglip(seed: int = 11) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=SIGLIP_WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=1, image_size=SIGLIP_SIDE_PX, patch_size=8
    )
    return make_random(lambda: SiglipVisionModel(config), seed)  # type: ignore[no-any-return]


def make_redux(seed: int = 12, *, text_width: int = CONFIG["joint_attention_dim"]) -> ReduxImageEncoder:
    return make_random(lambda: ReduxImageEncoder(redux_dim=SIGLIP_WIDTH, txt_in_features=text_width), seed)  # type: ignore[no-any-return]


def siglip_tensors(siglip: SiglipVisionModel) -> dict[str, Tensor]:
    """As published: with the prefix, and with the pooling head that Redux does not read."""
    return {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in siglip.state_dict().items()}


def adapter_tables(*, seed: int = 13, num_tokens: int = NUM_TOKENS, num_blocks: int = CONFIG["num_layers"]) -> dict[str, dict[str, Tensor]]:
    """Tables "image_proj" and "ip_adapter" as diffusers loads them."""
    draw, context = torch.Generator().manual_seed(seed), int(CONFIG["joint_attention_dim"])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    projection = {
        "proj.weight": random(num_tokens * context, PROJECTED), "proj.bias": random(1, num_tokens * context)[0],
        "norm.weight": 1.0 + random(1, context)[0], "norm.bias": random(1, context)[0],
    }  # fmt: skip
    blocks: dict[str, Tensor] = {}
    for number in range(num_blocks):
        for what in ("k", "v"):
            blocks |= {f"{number}.to_{what}_ip.weight": random(WIDTH, context), f"{number}.to_{what}_ip.bias": random(1, WIDTH)[0]}
    return {"image_proj": projection, "ip_adapter": blocks}


def xlabs_tensors(tables: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """XLabs' names."""
    made = {f"ip_adapter_proj_model.{key}": tensor for key, tensor in tables["image_proj"].items()}
    for key, tensor in tables["ip_adapter"].items():
        number, layer, end = key.split(".")
        made[f"double_blocks.{number}.processor.ip_adapter_double_stream_{layer[3]}_proj.{end}"] = tensor
    return made


def write(path: Path, tensors: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in dict(tensors).items()}, path)
    return path
