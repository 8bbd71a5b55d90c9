"""Tiny Flux.1 checkpoints as users have them: a transformer with its modules next to it, all in one file, and diffusers' names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from backend.key_layout import vae_to_ldm
from tests.support.flux_networks import CLIP_WIDTH, make_flux, make_random, make_vae, original_tensors
from tests.support.kept import kept
from tests.support.t5_encoders import t5_encoder, t5_state_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxFiles:
    """A checkpoint with the modules that it needs, and diffusers' and transformers' networks that they were written from."""

    checkpoint: Path
    modules: tuple[Path, ...]
    flux: FluxTransformer2DModel
    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: Any


LAYOUTS = ("original", "all-in-one", "diffusers")


def write_flux(
    data_dir: Path, layout: str = "original", *, name: str = "flux", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> FluxFiles:
    """Files where users put them. "original": a transformer alone, with ae, clip_l and t5xxl as modules; "all-in-one": one file; "diffusers": the
    transformer and the VAE under the library's names. Weights are rounded to `dtype` in the networks too."""
    flux, vae, clip, t5 = make_flux(seed, **changes), make_vae(), make_clip(), t5_encoder()
    for network in (flux, vae, clip):
        _round(network, dtype)
    _scale_outputs(flux, vae)
    clip_tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in clip.state_dict().items()}
    folder = data_dir / "models"
    checkpoint = folder / "Stable-diffusion" / f"{name}.safetensors"
    if layout == "all-in-one":
        whole = original_tensors(flux, "model.diffusion_model.")
        whole |= {f"vae.{key}": tensor for key, tensor in vae_to_ldm(vae.state_dict(), vae.config).items()}
        whole |= {f"text_encoders.clip_l.transformer.{key}": tensor for key, tensor in clip_tensors.items()}
        whole |= t5_state_dict(t5, "text_encoders.t5xxl.transformer.")
        _save(checkpoint, whole, dtype)
        return FluxFiles(checkpoint=checkpoint, modules=(), flux=flux, vae=vae, clip=clip, t5=t5)
    is_original = layout == "original"
    _save(checkpoint, original_tensors(flux) if is_original else dict(flux.state_dict()), dtype)
    modules = {
        folder / "VAE" / "ae.safetensors": vae_to_ldm(vae.state_dict(), vae.config) if is_original else dict(vae.state_dict()),
        folder / "text_encoder" / "clip_l.safetensors": clip_tensors,
        folder / "text_encoder" / "t5xxl_fp16.safetensors": t5_state_dict(t5),
    }
    for path, tensors in modules.items():
        _save(path, tensors, dtype)
    return FluxFiles(checkpoint=checkpoint, modules=tuple(modules), flux=flux, vae=vae, clip=clip, t5=t5)


@kept
def make_clip(seed: int = 2) -> CLIPTextModel:
    """CLIP-L's vocabulary, narrow."""
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=CLIP_WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=77,
        hidden_act="quick_gelu", projection_dim=CLIP_WIDTH, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    return make_random(lambda: CLIPTextModel(config), seed)


def _save(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.to(dtype).contiguous().clone() for key, tensor in tensors.items()}, path)


@torch.no_grad()
def _round(network: nn.Module, dtype: torch.dtype) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def _scale_outputs(flux: FluxTransformer2DModel, vae: AutoencoderKL) -> None:
    """Flows of about the noise's size, pictures mostly within -1..1, a narrow posterior; all by powers of two, which every type has exactly."""
    generator = torch.Generator().manual_seed(7)
    tokens, text = (
        torch.randn(1, 16, flux.config.in_channels, generator=generator),
        torch.randn(1, 8, flux.config.joint_attention_dim, generator=generator),
    )
    pooled, guidance = torch.randn(1, CLIP_WIDTH, generator=generator), torch.tensor([3.5]) if flux.config.guidance_embeds else None
    (flow,) = flux(tokens, text, pooled, torch.tensor([0.5]), torch.zeros(16, 3), torch.zeros(8, 3), guidance, return_dict=False)
    _scale(flux.proj_out, 0.7 / float(flow.std()))
    picture = vae.decode(torch.randn(1, 16, 8, 8, generator=generator) / 0.3611).sample
    _scale(vae.decoder.conv_out, 0.4 / float(picture.std()))
    vae.encoder.conv_out.bias[16:].sub_(16.0)


def _scale(layer: nn.Module, factor: float) -> None:
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    for parameter in layer.parameters():
        parameter.mul_(power)
