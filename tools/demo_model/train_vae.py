"""Stages 1 and 4: the autoencoder, then only its decoder, which may train in parallel with the UNet because latents no longer change.

Reconstruction by L1, squared error and image gradients, with fixed noise on the latents; no adversarial loss and no pretrained network.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tools.demo_model.networks import LATENT_FACTOR, SIDE_PX, build_vae
from tools.demo_model.progress import Ema, StageClock, cosine_rate, iterate_steps, save_atomically
from tools.demo_model.scenes import Scene, draw_scene, sample_scene

OBJECT_WEIGHT = 4.0
OUTLINE_SHARE = 0.15
LATENT_NOISE = 0.1  # noise the decoder must tolerate; latents span a few units
LATENT_WEIGHT = 1e-5


def scenes_to_pixels(scenes: list[Scene], *, outline_only: bool = False) -> torch.Tensor:
    """(B, 3, 64, 64) float32 in -1..1."""
    stack = np.stack([np.asarray(draw_scene(scene, SIDE_PX, outline_only=outline_only)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def anchor_group_norms(module: nn.Module, reference: float = 1.0) -> None:
    """Give neighboring channels opposite biases before each group norm.

    At this width a group has two or three channels, and normalizing over so few discards how strong a color is. With a constant of either sign
    in each group, the norm divides by about that constant, and color strengths are preserved.
    """
    for name, layer in module.named_modules():
        feeds_norm = name.endswith(("conv_in", "conv1", "conv2", "conv_shortcut", "samplers.0.conv"))
        if isinstance(layer, nn.Conv2d) and feeds_norm and layer.bias is not None:
            layer.bias[0::2] = reference if not name.endswith("conv2") else 0.0
            layer.bias[1::2] = -reference if not name.endswith("conv2") else 0.0


def thumbnail_loss(latents_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """Distance of the first three latent channels from the picture's 8x8 means: early guidance that separates colors."""
    means_BCHW = functional.avg_pool2d(target_BCHW, LATENT_FACTOR)
    return (latents_BCHW[:, :3].float() - 2 * means_BCHW).square().mean()


def reconstruction_loss(out_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """L1 and squared error with objects weighted against their background, squared error of 4x4 means (color), L1 of pixel differences (edges)."""
    background_BCHW = target_BCHW[:, :, :1, :1]  # objects never touch the corners
    object_BHW = (target_BCHW - background_BCHW).abs().amax(1, keepdim=True) > 0.05
    weight_BHW = 1 + OBJECT_WEIGHT * object_BHW.float()
    error_BCHW = (out_BCHW - target_BCHW) * weight_BHW
    loss = error_BCHW.abs().mean() + (error_BCHW * (out_BCHW - target_BCHW)).mean()
    loss = loss + 2 * functional.avg_pool2d(error_BCHW, 4).square().mean()
    for dim in (2, 3):
        loss = loss + functional.l1_loss(out_BCHW.diff(dim=dim), target_BCHW.diff(dim=dim))
    return loss


def train_vae(
    work_dir: Path, *, num_steps: int, limit_s: float | None = None, batch: int = 8, rate: float = 1e-3, decoder_only: bool = False
) -> None:
    """Train to `vae.pt`. With `decoder_only`, continue from there to `decoder.pt` with encoder and latents fixed."""
    torch.manual_seed(1)
    path = work_dir / ("decoder.pt" if decoder_only else "vae.pt")
    vae = build_vae()
    anchor_group_norms(vae)
    if decoder_only:
        vae.load_state_dict(torch.load(work_dir / "vae.pt", weights_only=True)["ema"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    ema, clock = Ema(vae), StageClock(limit_s=limit_s)
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.num_updates = state["ema"], state["step"]
        clock = StageClock(state["step"], state["spent_s"], limit_s)

    def save(clock: StageClock) -> None:
        state = {"model": vae.state_dict(), "ema": ema.shadow, "optimizer": optimizer.state_dict()}
        save_atomically(state | {"step": clock.step, "spent_s": clock.spent_s}, path)

    rng = random.Random(1000 + clock.step)
    mean_loss = 0.0
    for fraction, bar in iterate_steps(path.stem, clock, num_steps, save):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(rate, fraction)
        outline_only = rng.random() < OUTLINE_SHARE  # outlines must survive the autoencoder for the outline LoRA
        pixels = scenes_to_pixels([sample_scene(rng) for _ in range(batch)], outline_only=outline_only)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                latents = vae.encode(pixels).latent_dist.mean
            out = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        loss = reconstruction_loss(out.float(), pixels)
        if not decoder_only:
            loss = loss + LATENT_WEIGHT * latents.float().square().mean()
            loss = loss + max(0.02, 1 - fraction / 0.25) * thumbnail_loss(latents, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update()
        mean_loss = loss.item() if not mean_loss else 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)


def load_trained(module: nn.Module, path: Path, key: str) -> nn.Module:
    """Load one stage's weights into a module, for use without gradients."""
    module.load_state_dict(torch.load(path, weights_only=True)[key])
    return module.eval().requires_grad_(False)


def load_vae(work_dir: Path) -> nn.Module:
    """The trained autoencoder, with the decoder from the later stage if it exists."""
    refined = work_dir / "decoder.pt"
    return load_trained(build_vae(), refined if refined.exists() else work_dir / "vae.pt", "ema")
