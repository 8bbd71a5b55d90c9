"""The demo checkpoint's networks for training its ControlNet and LoRA: read from the exported file, frozen, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from backend.families.registry import find_family
from tools.demo_model.networks import LATENT_SCALE, build_text_encoder, build_unet, build_vae
from tools.demo_model.train_unet import MIN_SNR_GAMMA, NUM_TRAIN_STEPS, alphas_cumprod


@dataclass(frozen=True, slots=True)
class BaseNetworks:
    unet: nn.Module
    vae: nn.Module
    encoder: nn.Module


@torch.no_grad()
def load_base(checkpoint: Path, device: torch.device) -> BaseNetworks:
    """The three networks, fp32, without gradients. Raises: ValueError if the file does not contain them."""
    unet, vae, encoder = build_unet(), build_vae(), build_text_encoder()
    stored = load_file(checkpoint)
    for key, tensor in find_family("sd15").join_checkpoint(unet, vae, [encoder]).items():  # shares the networks' memory
        if tensor.is_floating_point():
            if key not in stored or stored[key].shape != tensor.shape:
                raise ValueError(f"{checkpoint.name}: is not the demo checkpoint; {key} is missing or has another shape. Export it again.")
            tensor.copy_(stored[key])
    frozen = [module.to(device).eval().requires_grad_(False) for module in (unet, vae, encoder)]
    return BaseNetworks(*frozen)


@torch.inference_mode()
def encode_pictures(vae: nn.Module, pictures_NHWC: np.ndarray, *, batch: int = 250) -> torch.Tensor:
    """Latents (N, 4, 8, 8) of uint8 pictures for the UNet, on the networks' device."""
    device = next(vae.parameters()).device
    parts = []
    for first in range(0, len(pictures_NHWC), batch):
        pixels = torch.from_numpy(pictures_NHWC[first : first + batch]).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        parts.append(vae.encode(pixels).latent_dist.mean * LATENT_SCALE)
    return torch.cat(parts).clone()


@dataclass(slots=True)
class Noiser:
    """Makes noisy latents at random steps, and computes the min-SNR weighted error of a noise prediction."""

    device: torch.device
    generator: torch.Generator
    abar_T: torch.Tensor
    weight_T: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, seed: int) -> Noiser:
        abar_T = alphas_cumprod().to(device)
        snr_T = abar_T / (1 - abar_T)
        return cls(device, torch.Generator(device).manual_seed(seed), abar_T, snr_T.clamp(max=MIN_SNR_GAMMA) / snr_T)

    def add_noise(self, x0_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(noisy latents, noise, step of each row)."""
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=self.generator, device=self.device)
        t_B = torch.randint(0, NUM_TRAIN_STEPS, (len(x0_BCHW),), generator=self.generator, device=self.device)
        abar_B = self.abar_T[t_B].view(-1, 1, 1, 1)
        return abar_B.sqrt() * x0_BCHW + (1 - abar_B).sqrt() * noise_BCHW, noise_BCHW, t_B

    def loss(self, eps_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The mean error; nearly clean latents have less weight."""
        error_B = functional.mse_loss(eps_BCHW.float(), noise_BCHW, reduction="none").mean((1, 2, 3))
        return (error_B * self.weight_T[t_B]).mean()
