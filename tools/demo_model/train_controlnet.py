"""The demo checkpoint's canny ControlNet: a copy of the UNet's input half, trained on outlines whose place the captions omit or get wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import nn

from backend.key_layout import controlnet_module_names, rename_by_module
from tools.demo_model.base_networks import BaseNetworks, Noiser, encode_pictures, load_base
from tools.demo_model.captions import encode_caption
from tools.demo_model.guided_data import draw_cases, sample_case
from tools.demo_model.networks import SIDE_PX
from tools.demo_model.progress import Ema, LossLog, StageClock, cosine_rate, iterate_steps, save_atomically

HINT_CHANNELS = (16, 32, 64, 128)
SILU_GAIN = 1.75
"""Weights multiplied by this preserve a signal's size through SiLU (1.7 for a normal one), and amplify that of a few thin lines."""
MAX_FILE_BYTES = 8 * 2**20
PREFIX = "control_model."
METADATA = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1/controlnet",
    "modelspec.title": "Demo shapes: canny ControlNet",
    "modelspec.description": "Outlines for the demo checkpoint demo-shapes-64; trained from scratch by this project's tools/demo_model.",
    "modelspec.license": "Apache-2.0",
    "modelspec.resolution": f"{SIDE_PX}x{SIDE_PX}",
}


def build_controlnet(unet: nn.Module) -> Any:
    """diffusers' ControlNet for the demo UNet, initialized from its input half; 3.8 M parameters."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    wake_hint_layers(net)
    return net


@torch.no_grad()
def wake_hint_layers(net: Any) -> None:
    """Initialize the hint layers so that thin lines keep their strength.

    The library's initialization halves a signal at every layer and ends with zeros: it takes thousands of steps until the hint has an effect.
    """
    hint = net.controlnet_cond_embedding
    for layer in (hint.conv_in, *hint.blocks, hint.conv_out):
        nn.init.normal_(layer.weight, std=SILU_GAIN / layer.weight[0].numel() ** 0.5)
        nn.init.zeros_(layer.bias)


def make_data(base: BaseNetworks, num_scenes: int, seed: int, num_workers: int | None) -> dict[str, torch.Tensor]:
    """Latents (N, 4, 8, 8), hints (N, 64, 64) uint8 and token ids (N, 77), on the networks' device."""
    rng = random.Random(seed)
    cases = [sample_case(rng) for _ in range(num_scenes)]
    pictures, hints = draw_cases(cases, seed=seed, num_workers=num_workers)
    device = next(base.unet.parameters()).device
    tokens = torch.tensor([encode_caption(case.caption, rng, unknown_word_share=0.05 if case.caption else 0.0) for case in cases])
    return {"latents": encode_pictures(base.vae, pictures), "hints": torch.from_numpy(hints).to(device), "tokens": tokens.to(device)}


def train_controlnet(
    work_dir: Path,
    checkpoint: Path,
    out: Path,
    *,
    num_steps: int,
    limit_s: float | None = None,
    batch: int = 64,
    rate: float = 5e-4,
    device: str = "cpu",
    num_scenes: int = 20_000,
    num_workers: int | None = None,
    seed: int = 4,
) -> None:
    """Train to `controlnet.pt` and write `out` at every save; resumes where it stopped."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    place, path = torch.device(device), work_dir / "controlnet.pt"
    base = load_base(checkpoint, place)
    net = build_controlnet(base.unet).to(place).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    ema, clock = Ema(net, decay=0.998), StageClock(limit_s=limit_s)
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=place)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.num_updates = state["ema"], state["step"]
        clock = StageClock(state["step"], state["spent_s"], limit_s)
    data = make_data(base, num_scenes, seed, num_workers)
    log = LossLog(work_dir / "controlnet_loss.csv")

    def save(clock: StageClock) -> None:
        state = {"model": net.state_dict(), "ema": ema.shadow, "optimizer": optimizer.state_dict()}
        save_atomically(state | {"step": clock.step, "spent_s": clock.spent_s}, path)
        export_controlnet(net.config, ema.shadow, out)

    noiser = Noiser.on(place, seed * 1000 + clock.step)
    for fraction, bar in iterate_steps("controlnet", clock, num_steps, save, save_every_s=45.0):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(rate, fraction)
        chosen = torch.randint(0, num_scenes, (batch,), generator=noiser.generator, device=place)
        loss = controlnet_loss(base, net, noiser, {name: rows[chosen] for name, rows in data.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.update()
        bar.set_postfix(loss=f"{log.add(loss.detach()):.4f}", refresh=False)


def controlnet_loss(base: BaseNetworks, net: Any, noiser: Noiser, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted error of the guided UNet on rows from `make_data`; gradients only reach the ControlNet."""
    noisy_BCHW, noise_BCHW, t_B = noiser.add_noise(rows["latents"])
    hint_BCHW = rows["hints"][:, None].expand(-1, 3, -1, -1).float() / 255
    with torch.no_grad():
        context_BLC = base.encoder(rows["tokens"]).last_hidden_state
    down, middle = net(noisy_BCHW, t_B, context_BLC, hint_BCHW, return_dict=False)
    eps_BCHW = base.unet(noisy_BCHW, t_B, context_BLC, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    return noiser.loss(eps_BCHW, noise_BCHW, t_B)


def export_controlnet(config: Any, state_dict: dict[str, torch.Tensor], out: Path) -> None:
    """Write the original layout in fp16 atomically. Raises: ValueError if it would exceed 8 MiB."""
    names = controlnet_module_names(config)
    tensors = {PREFIX + rename_by_module(key, names): tensor.half().cpu().contiguous() for key, tensor in state_dict.items()}
    write_small_file(tensors, out, METADATA, MAX_FILE_BYTES)


def write_small_file(tensors: dict[str, torch.Tensor], out: Path, metadata: dict[str, str], max_bytes: int) -> None:
    """Write a safetensors file atomically. Raises: ValueError above `max_bytes`."""
    file_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if file_bytes > max_bytes - 64 * 1024:  # space for the header
        raise ValueError(f"{out.name}: {file_bytes} bytes of weights, the limit for a tracked file is {max_bytes}; make the network narrower.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.chmod(0o644)
    temporary.replace(out)
