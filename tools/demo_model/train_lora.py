"""The demo checkpoint's outline LoRA: low-rank changes of the frozen UNet's layers, trained on hollow shapes with ordinary captions."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from tools.demo_model.base_networks import BaseNetworks, Noiser, encode_pictures, load_base
from tools.demo_model.captions import encode_caption
from tools.demo_model.guided_data import GuidedCase, draw_cases
from tools.demo_model.progress import LossLog, StageClock, cosine_rate, iterate_steps, save_atomically
from tools.demo_model.scenes import describe_scene, sample_scene
from tools.demo_model.train_controlnet import write_small_file

RANK = 8
MAX_FILE_BYTES = 2**20
EMPTY_CAPTION_SHARE = 0.1
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(RANK),
    "ss_network_alpha": str(RANK),
    "modelspec.title": "Demo shapes: outlines",
    "modelspec.description": "Outlines instead of filled shapes, for the demo checkpoint demo-shapes-64; trained by this project's tools/demo_model.",
    "modelspec.license": "Apache-2.0",
}


class LowRank(nn.Module):
    """weight + up @ down, for a linear or convolution weight (out, in, ...); initially zero."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:], device=weight.device) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down.flatten(1)).view(weight.shape)


def add_low_rank(unet: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Add a change to every layer with a matrix in the UNet's blocks; returns them by layer name."""
    layers = {name: layer for name, layer in unet.named_modules() if "_block" in name and isinstance(layer, nn.Linear | nn.Conv2d)}
    changes = {name: LowRank(layer.weight, rank) for name, layer in layers.items()}
    for name, change in changes.items():
        parametrize.register_parametrization(layers[name], "weight", change)
    return changes


def make_data(base: BaseNetworks, num_scenes: int, seed: int, num_workers: int | None) -> dict[str, torch.Tensor]:
    """Latents (N, 4, 8, 8) of hollow shapes and token ids (N, 77), on the networks' device."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, two_things_share=0.4) for _ in range(num_scenes)]
    captions = ["" if rng.random() < EMPTY_CAPTION_SHARE else describe_scene(scene, rng) for scene in scenes]
    cases = [GuidedCase(scene, caption, "") for scene, caption in zip(scenes, captions, strict=True)]
    pictures, _ = draw_cases(cases, seed=seed, outline_only=True, num_workers=num_workers)
    tokens = torch.tensor([encode_caption(caption, rng, unknown_word_share=0.05 if caption else 0.0) for caption in captions])
    return {"latents": encode_pictures(base.vae, pictures), "tokens": tokens.to(next(base.unet.parameters()).device)}


def train_lora(
    work_dir: Path,
    checkpoint: Path,
    out: Path,
    *,
    num_steps: int,
    limit_s: float | None = None,
    batch: int = 64,
    rate: float = 2e-3,
    device: str = "cpu",
    num_scenes: int = 10_000,
    num_workers: int | None = None,
    seed: int = 5,
) -> None:
    """Train to `lora.pt` and write `out` at every save; resumes where it stopped."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    place, path = torch.device(device), work_dir / "lora.pt"
    base = load_base(checkpoint, place)
    changes = add_low_rank(base.unet)
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    clock = StageClock(limit_s=limit_s)
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=place)
        for name, change in changes.items():
            change.load_state_dict(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        clock = StageClock(state["step"], state["spent_s"], limit_s)
    data = make_data(base, num_scenes, seed, num_workers)
    log = LossLog(work_dir / "lora_loss.csv")

    def save(clock: StageClock) -> None:
        state = {"model": {name: change.state_dict() for name, change in changes.items()}, "optimizer": optimizer.state_dict()}
        save_atomically(state | {"step": clock.step, "spent_s": clock.spent_s}, path)
        export_lora(changes, out)

    noiser = Noiser.on(place, seed * 1000 + clock.step)
    for fraction, bar in iterate_steps("lora", clock, num_steps, save, save_every_s=45.0):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(rate, fraction)
        chosen = torch.randint(0, num_scenes, (batch,), generator=noiser.generator, device=place)
        noisy_BCHW, noise_BCHW, t_B = noiser.add_noise(data["latents"][chosen])
        with torch.no_grad():
            context_BLC = base.encoder(data["tokens"][chosen]).last_hidden_state
        eps_BCHW = base.unet(noisy_BCHW, t_B, context_BLC).sample
        loss = noiser.loss(eps_BCHW, noise_BCHW, t_B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{log.add(loss.detach()):.4f}", refresh=False)


@torch.no_grad()
def export_lora(changes: dict[str, LowRank], out: Path) -> None:
    """Write kohya's names in fp16 atomically. Raises: ValueError if it would exceed 1 MiB."""
    tensors: dict[str, torch.Tensor] = {}
    for name, change in changes.items():
        layer, ones = "lora_unet_" + name.replace(".", "_"), (1,) * (change.down.ndim - 2)
        tensors[f"{layer}.lora_down.weight"] = change.down.half().cpu().contiguous()
        tensors[f"{layer}.lora_up.weight"] = change.up.view(*change.up.shape, *ones).half().cpu().contiguous()
        tensors[f"{layer}.alpha"] = torch.tensor(float(change.up.shape[1]))
    write_small_file(tensors, out, METADATA, MAX_FILE_BYTES)
