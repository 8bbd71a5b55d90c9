"""IP-Adapter and image encoder files for tests: random and narrow, with the names of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.checkpoints import ReferenceModels
from tests.support.kept import kept

WIDTH, PROJECTED, SIDE_PX = 48, 40, 32
"""Of the narrow image encoder."""
KINDS = ("plain", "plus", "full")


@kept
def build_tower(seed: int = 11) -> CLIPVisionModelWithProjection:
    """A random image encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=96, projection_dim=PROJECTED, num_hidden_layers=3, num_attention_heads=1, image_size=SIDE_PX,
            patch_size=8, hidden_act="gelu",
        )  # fmt: skip
        return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def write_tower(path: Path, tower: CLIPVisionModelWithProjection) -> Path:
    """With the prefix `vision_model.`, as published."""
    named = {
        key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}": tensor
        for key, tensor in tower.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, path)
    return path


def adapter_tables(models: ReferenceModels, kind: str, *, seed: int = 12) -> dict[str, dict[str, Tensor]]:
    """Tables "image_proj" and "ip_adapter" of a random adapter: plain (projection), plus (resampler) or full (one token per patch)."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    context = int(models.unet.config.cross_attention_dim)
    tables = {"image_proj": _projection(kind, context, random), "ip_adapter": {}}
    number = 1
    unet: Any = models.unet
    for name in unet.attn_processors:
        if ".attn2." in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            tables["ip_adapter"] |= {f"{number}.to_{what}_ip.weight": random(width, context) for what in ("k", "v")}
            number += 2
    return tables


def _projection(kind: str, context: int, random: Any) -> dict[str, Tensor]:
    norm = {"norm.weight": 1.0 + random(1, context)[0], "norm.bias": random(1, context)[0]}
    if kind == "plain":
        return {"proj.weight": random(4 * context, PROJECTED), "proj.bias": random(1, 4 * context)[0], **norm}
    if kind == "full":
        return {
            "proj.0.weight": random(WIDTH, WIDTH), "proj.0.bias": random(1, WIDTH)[0], "proj.2.weight": random(context, WIDTH),
            "proj.2.bias": random(1, context)[0], "proj.3.weight": norm["norm.weight"], "proj.3.bias": norm["norm.bias"],
        }  # fmt: skip
    inner = 64
    found = {"latents": random(1, 8, inner), "proj_in.weight": random(inner, WIDTH), "proj_in.bias": random(1, inner)[0],
             "proj_out.weight": random(context, inner), "proj_out.bias": random(1, context)[0],
             "norm_out.weight": norm["norm.weight"], "norm_out.bias": norm["norm.bias"]}  # fmt: skip
    for level in range(4):
        for layer in (f"layers.{level}.0.norm1", f"layers.{level}.0.norm2", f"layers.{level}.1.0"):
            found |= {f"{layer}.weight": 1.0 + random(1, inner)[0], f"{layer}.bias": random(1, inner)[0]}
        found |= {f"layers.{level}.0.to_q.weight": random(inner, inner), f"layers.{level}.0.to_kv.weight": random(2 * inner, inner),
                  f"layers.{level}.0.to_out.weight": random(inner, inner), f"layers.{level}.1.1.weight": random(4 * inner, inner),
                  f"layers.{level}.1.3.weight": random(inner, 4 * inner)}  # fmt: skip
    return found


def write_adapter_file(path: Path, tables: dict[str, dict[str, Tensor]]) -> Path:
    """`.safetensors` with dotted names, or a pickled pair of tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({f"{table}.{key}": tensor.contiguous() for table, named in tables.items() for key, tensor in named.items()}, path)
    else:
        torch.save(tables, path)
    return path


def reference_picture(width_px: int = 60, height_px: int = 44, seed: int = 13) -> Image.Image:
    """A random picture that is not square."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8))
