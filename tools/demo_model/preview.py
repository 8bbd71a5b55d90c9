"""Pictures from a model in training, made with diffusers, for a look before anything is exported."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image

from tools.demo_model.captions import encode_caption
from tools.demo_model.networks import LATENT_FACTOR, SIDE_PX, build_text_encoder, build_unet
from tools.demo_model.train_vae import load_trained, load_vae


def to_images(pixels_BCHW: torch.Tensor) -> list[Image.Image]:
    """Pixels -1..1 as RGB pictures."""
    array = pixels_BCHW.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


@torch.inference_mode()
def sample_preview(work_dir: Path, prompts: list[str], *, num_steps: int = 20, cfg_scale: float = 5.0, seed: int = 0) -> list[Image.Image]:
    """One picture per prompt from the averaged weights, DDIM."""
    encoder = load_trained(build_text_encoder(), work_dir / "text.pt", "model")
    unet = load_trained(build_unet(), work_dir / "unet.pt", "ema")
    vae = load_vae(work_dir)
    data = torch.load(work_dir / "latents.pt", weights_only=True)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(num_steps)
    rng = random.Random(0)
    tokens = torch.tensor([encode_caption(prompt, rng, unknown_word_share=0.0) for prompt in [""] * len(prompts) + prompts])
    context = encoder(tokens).last_hidden_state
    side = SIDE_PX // LATENT_FACTOR
    latents = torch.randn((len(prompts), 4, side, side), generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        uncond, cond = unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        latents = scheduler.step(uncond + cfg_scale * (cond - uncond), t, latents).prev_sample
    raw = torch.einsum("dc,nchw->ndhw", torch.linalg.inv(data["matrix"]), latents) + data["mean"][:, None, None]
    return to_images(vae.decode(raw).sample)
