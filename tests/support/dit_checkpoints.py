"""Tiny checkpoints of transformer families as users have them: the transformer with its modules next to it, all in one file, and diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backend.key_layout import vae_to_ldm

LAYOUTS = ("original", "all-in-one", "diffusers")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """A text encoder: `tensors` as its own file has them, under `file_name`, and its prefix in an all-in-one file."""

    network: Any
    tensors: Mapping[str, Tensor]
    file_name: str
    prefix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DitFiles:
    """A checkpoint with the modules that it needs, and the libraries' networks that they were written from."""

    checkpoint: Path
    modules: tuple[Path, ...]
    transformer: Any
    vae: Any
    texts: Mapping[str, Any] = field(default_factory=dict)


def write_dit(
    data_dir: Path,
    layout: str,
    *,
    name: str,
    transformer: Any,
    original: Mapping[str, Tensor],
    vae: Any,
    texts: Mapping[str, TextFile],
    original_vae: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    vae_name: str = "ae",
) -> DitFiles:
    """Files where users put them. `original`, `original_vae`: weights in the original layout. "all-in-one" has everything in one file."""
    folder = data_dir / "models"
    checkpoint = folder / "Stable-diffusion" / f"{name}.safetensors"
    original_vae = original_vae or vae_to_ldm(vae.state_dict(), vae.config)
    networks = {key: text.network for key, text in texts.items()}
    if layout == "all-in-one":
        whole = {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}
        whole |= {f"vae.{key}": tensor for key, tensor in original_vae.items()}
        for text in texts.values():
            whole |= {text.prefix + key: tensor for key, tensor in text.tensors.items()}
        save(checkpoint, whole, dtype)
        return DitFiles(checkpoint=checkpoint, modules=(), transformer=transformer, vae=vae, texts=networks)
    is_original = layout == "original"
    save(checkpoint, original if is_original else dict(transformer.state_dict()), dtype)
    modules: dict[Path, Mapping[str, Tensor]] = {folder / "VAE" / f"{vae_name}.safetensors": original_vae if is_original else dict(vae.state_dict())}
    modules |= {folder / "text_encoder" / text.file_name: text.tensors for text in texts.values()}
    for path, tensors in modules.items():
        save(path, tensors, dtype)
    return DitFiles(checkpoint=checkpoint, modules=tuple(modules), transformer=transformer, vae=vae, texts=networks)


def save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.to(dtype).contiguous().clone() for key, tensor in tensors.items()}, path)


@torch.no_grad()
def settle(out_layer: nn.Module, flow: Tensor, vae: Any, latent_scale: float) -> None:
    """Flows of about the noise's size, pictures mostly within -1..1, a narrow posterior; all by powers of two, which every type has exactly."""
    scale(out_layer, 0.7 / float(flow.std()))
    channels = vae.config.latent_channels
    picture = vae.decode(torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(7)) / latent_scale).sample
    scale(vae.decoder.conv_out, 0.4 / float(picture.std()))
    vae.encoder.conv_out.bias[channels:].sub_(16.0)


def scale(layer: nn.Module, factor: float) -> None:
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    for parameter in layer.parameters():
        parameter.mul_(power)
