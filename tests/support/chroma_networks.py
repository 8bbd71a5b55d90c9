"""Tiny random Chroma networks from diffusers, and checkpoints of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from tests.support.dit_checkpoints import DitFiles, TextFile, settle, write_dit
from tests.support.flux_networks import make_random, make_vae
from tests.support.flux_networks import original_tensors as original_flux_tensors
from tests.support.t5_encoders import t5_encoder, t5_state_dict

WIDTH = 48
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 24,
    "approximator_layers": 2,
}


def make_chroma(seed: int = 0, **changes: Any) -> ChromaTransformer2DModel:
    """diffusers' own network. All weights random, including norms and biases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make_random(lambda: ChromaTransformer2DModel(**{**CONFIG, **changes}), seed)  # type: ignore[no-any-return]


def original_tensors(chroma: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in the original layout, by formulas of this file and Flux's alone."""
    net = "distilled_guidance_layer."
    names = {}
    for key in (key for key in chroma.state_dict() if key.startswith(net)):
        other = key.replace(".linear_1.", ".in_layer.").replace(".linear_2.", ".out_layer.")
        names[key] = other.removesuffix("weight") + "scale" if ".norms." in key else other
    return original_flux_tensors(chroma, prefix, names)


def library_flow(chroma: Any, rows: dict[str, Tensor], **control: Any) -> Tensor:
    """The library's forward on latents (B, 16, H, W) of even sides, packed as its pipeline does it. All text counts."""
    batch, channels, height, width = rows["x"].shape
    packed = rows["x"].view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] += torch.arange(height // 2)[:, None]
    places[..., 2] += torch.arange(width // 2)[None]
    (flow,) = chroma(
        packed, rows["context"], rows["timesteps"], places.reshape(-1, 3), torch.zeros(rows["context"].shape[1], 3), return_dict=False, **control
    )
    return flow.view(batch, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)  # type: ignore[no-any-return]


def write_chroma(data_dir: Path, layout: str = "original", *, name: str = "chroma", seed: int = 0) -> DitFiles:
    chroma, vae, t5 = make_chroma(seed), make_vae(), t5_encoder()
    generator = torch.Generator().manual_seed(7)
    rows = {
        "x": torch.randn(1, 16, 8, 8, generator=generator),
        "context": torch.randn(1, 8, CONFIG["joint_attention_dim"], generator=generator),
        "timesteps": torch.tensor([0.5]),
    }
    settle(chroma.proj_out, library_flow(chroma, rows), vae, 0.3611)
    text = TextFile(network=t5, tensors=t5_state_dict(t5), file_name="t5xxl_fp16.safetensors", prefix="text_encoders.t5xxl.transformer.")
    return write_dit(
        data_dir, layout, name=name, transformer=chroma, original=original_tensors(chroma), vae=vae, texts={"t5xxl": text}
    )  # fmt: skip
