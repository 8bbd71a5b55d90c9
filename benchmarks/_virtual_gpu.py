"""One guided UNet step and one VAE decode of SD1.x with a given width, on the CPU and on a virtual GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from backend.devices import virtual_gpu
from tests.support.checkpoints import build_models
from tools.measure import Metrics, Variant

CAP_BYTES = 8 * 2**30


def make_variants(width: int, side: int) -> Mapping[str, Variant]:
    """The same networks twice, one set of them on the virtual GPU; the results are compared before anything is timed."""
    torch.set_num_threads(1)
    (device,) = virtual_gpu.install((CAP_BYTES,))
    on_cpu, on_virtual = _make_step(width, side, torch.device("cpu")), _make_step(width, side, device)
    if not torch.equal(on_cpu(), on_virtual().cpu()):
        raise RuntimeError("The virtual GPU's result differs from the CPU's.")
    return {"CPU": _measured(on_cpu, None), "virtual GPU": _measured(on_virtual, virtual_gpu.get_device(device))}


def _make_step(width: int, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    models = build_models(Path("none"), "sd15", width=width)
    unet, vae = (network.requires_grad_(False).to(device) for network in (models.unet, models.vae))
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 4, side, side, generator=generator).to(device)
    context_BLC = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator).to(device)
    timestep = torch.tensor([500, 500]).to(device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        denoised_BCHW = unet(x_BCHW, timestep, context_BLC, return_dict=False)[0]
        picture_BCHW: torch.Tensor = vae.decode(denoised_BCHW[:1], return_dict=False)[0]
        return picture_BCHW

    return step


def _measured(step: Callable[[], torch.Tensor], device: virtual_gpu.VirtualDevice | None) -> Variant:
    """Adds CPU seconds and, on the virtual GPU, its operations and peak."""

    def call() -> Metrics:
        began_s = time.process_time()
        if device is None:
            step()
            return {"CPU s": time.process_time() - began_s}
        num_before = device.num_operations
        device.reset_peak()
        live_bytes = device.live_bytes
        step()
        spent_s = time.process_time() - began_s
        return {
            "CPU s": spent_s,
            "operations": device.num_operations - num_before,
            "weights MiB": live_bytes / 2**20,
            "peak above weights MiB": (device.peak_bytes - live_bytes) / 2**20,
        }

    return call
