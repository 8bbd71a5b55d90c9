"""Stage 3: the denoiser. Epsilon prediction with Stable Diffusion's noise schedule, min-SNR weights, averaged weights, 10 % empty captions."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tqdm import tqdm

from tools.demo_model.captions import encode_caption
from tools.demo_model.networks import build_text_encoder, build_unet
from tools.demo_model.progress import Ema, StageClock, cosine_rate, iterate_steps, save_atomically
from tools.demo_model.scenes import Scene, describe_scene, sample_scene
from tools.demo_model.train_vae import load_trained, load_vae, scenes_to_pixels

NUM_TRAIN_STEPS = 1000
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, arXiv:2303.09556
EMPTY_CAPTION_SHARE = 0.1


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's "scaled linear" schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def whitening(latents_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (4,) and symmetric whitening matrix (4, 4) of the latent channels; export folds both into the VAE's 1x1 convolutions."""
    flat = latents_NCHW.transpose(0, 1).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    return mean.float(), (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()


@torch.inference_mode()
def encode_dataset(work_dir: Path, *, num_scenes: int = 20_000, batch: int = 100) -> None:
    """Draw scenes and store their latents; `dataset_scenes` recreates the scenes from their seed."""
    vae = load_vae(work_dir).to(memory_format=torch.channels_last)
    scenes, parts = dataset_scenes(num_scenes), []
    for first in tqdm(range(0, num_scenes, batch), desc="latents", mininterval=10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(vae.encode(scenes_to_pixels(scenes[first : first + batch])).latent_dist.mean.float())
    latents = torch.cat(parts)
    mean, matrix = whitening(latents)
    white = torch.einsum("dc,nchw->ndhw", matrix, latents - mean[:, None, None])
    save_atomically({"latents": white.half().contiguous(), "mean": mean, "matrix": matrix, "num_scenes": num_scenes}, work_dir / "latents.pt")


def dataset_scenes(num_scenes: int) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng, two_things_share=0.55) for _ in range(num_scenes)]


def train_unet(work_dir: Path, *, num_steps: int, limit_s: float | None = None, batch: int = 64, rate: float = 1e-3) -> None:
    torch.manual_seed(3)
    path = work_dir / "unet.pt"
    data = torch.load(work_dir / "latents.pt", weights_only=True)
    latents, scenes = data["latents"], dataset_scenes(data["num_scenes"])
    encoder = load_trained(build_text_encoder(), work_dir / "text.pt", "model")
    unet = build_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    ema, clock = Ema(unet, decay=0.9985), StageClock(limit_s=limit_s)
    if path.exists():
        state = torch.load(path, weights_only=True)
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.num_updates = state["ema"], state["step"]
        clock = StageClock(state["step"], state["spent_s"], limit_s)

    def save(clock: StageClock) -> None:
        state = {"model": unet.state_dict(), "ema": ema.shadow, "optimizer": optimizer.state_dict()}
        save_atomically(state | {"step": clock.step, "spent_s": clock.spent_s}, path)

    abar_T = alphas_cumprod()
    snr_T = abar_T / (1 - abar_T)
    weight_T = snr_T.clamp(max=MIN_SNR_GAMMA) / snr_T
    rng = random.Random(3000 + clock.step)
    generator = torch.Generator().manual_seed(3000 + clock.step)
    mean_loss = 0.0
    for fraction, bar in iterate_steps("unet", clock, num_steps, save):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(rate, fraction)
        chosen = [rng.randrange(len(scenes)) for _ in range(batch)]
        captions = ["" if rng.random() < EMPTY_CAPTION_SHARE else describe_scene(scenes[index], rng) for index in chosen]
        tokens = torch.tensor([encode_caption(caption, rng, unknown_word_share=0.1 if caption else 0.0) for caption in captions])
        x0_BCHW = latents[chosen].float()
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
        t_B = torch.randint(0, NUM_TRAIN_STEPS, (batch,), generator=generator)
        abar_B = abar_T[t_B].view(-1, 1, 1, 1)
        noisy_BCHW = abar_B.sqrt() * x0_BCHW + (1 - abar_B).sqrt() * noise_BCHW
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.inference_mode():
                context_BLC = encoder(tokens).last_hidden_state
            eps_BCHW = unet(noisy_BCHW, t_B, context_BLC.clone()).sample
        error_B = (eps_BCHW.float() - noise_BCHW).square().mean((1, 2, 3))
        loss = (error_B * weight_T[t_B]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.update()
        mean_loss = loss.item() if not mean_loss else 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", error=f"{error_B.mean().item():.3f}", refresh=False)
