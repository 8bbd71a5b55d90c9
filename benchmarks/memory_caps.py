"""How small may a device be? One picture with the SDXL layout under caps from large to barely possible."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from backend.loader import load_checkpoint
from backend.sampling.noise import ImageNoise
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from backend.sampling.schedules import compute_sigmas
from tests.support.checkpoints import write_checkpoint
from tools.measure import Bench, Metrics, Variant

CAPS_MIB = (512, 100, 80, 60, 40, 24, 16)
SIDE, NUM_STEPS = 16, 4
MIB = 2**20


class _Prompts(list[str]):
    width = height = 8 * SIDE
    is_negative_prompt = False


@torch.no_grad()
def make_picture(engine: Any) -> torch.Tensor:
    """128x128 pixels, 4 steps of DPM++ 2M Karras at CFG 7."""
    cond, uncond = (engine.get_learned_conditioning(_Prompts([prompt])) for prompt in ("a red cube", ""))
    unet = engine.forge_objects.unet
    cond, uncond = ({name: value.to(unet.load_device) for name, value in one.items()} for one in (cond, uncond))
    noise = ImageNoise((4, SIDE, SIDE), [1], source="CPU")
    sigmas_T = compute_sigmas("karras", NUM_STEPS, unet.model.predictor)
    x_BCHW = (noise.first() * sigmas_T[0]).to(unet.load_device)
    sampling_prepare(unet, x_BCHW)
    latents_BCHW = find_sampler("DPM++ 2M").function(
        lambda x, sigma: denoise_guided(unet, x, sigma, text_cond=cond, text_uncond=uncond, cond_scale=7.0)[0],
        x_BCHW, sigmas_T, settings=SamplerSettings(), noise=noise,
    )  # fmt: skip
    sampling_cleanup(unet)
    picture_BCHW: torch.Tensor = engine.decode_first_stage(latents_BCHW)
    return picture_BCHW.cpu()


def _load(path: Path, config: BackendConfig) -> Any:
    memory_management.configure(config, probe_devices(config))
    return load_checkpoint(path, config=config)


def _run_under_cap(path: Path, cap_mib: int, expected_BCHW: torch.Tensor) -> Metrics:
    engine = _load(path, BackendConfig(virtual_gpus_bytes=(cap_mib * MIB,)))
    picture_BCHW = make_picture(engine)
    copied = virtual_gpu.copied_bytes()
    return {
        "peak MiB": virtual_gpu.get_device(0).peak_bytes / MIB,
        "copied to the device MiB": copied["cpu", "vgpu:0"] / MIB,
        "difference to the CPU": float((picture_BCHW - expected_BCHW).abs().max()),
    }


def _make_variants() -> Mapping[str, Variant]:
    torch.set_num_threads(1)
    path = Path(tempfile.mkdtemp()) / "narrow.safetensors"
    write_checkpoint(path, "sdxl")
    expected_BCHW = make_picture(_load(path, BackendConfig(device_ids=("cpu",))))
    return {f"cap {cap_mib} MiB": partial(_run_under_cap, path, cap_mib, expected_BCHW) for cap_mib in CAPS_MIB}


BENCH = Bench(
    question="How small may a device be, and what does it cost? Loading and one picture of an SDXL-layout checkpoint (narrow: text encoders 33, UNet "
    "50, VAE 7, together 90 MiB in fp32), 128x128 pixels, 4 steps, on a virtual GPU with a cap. Time includes reading the file.",
    make_variants=_make_variants,
    baseline="cap 512 MiB",
    num_rounds=3,
    packages=("torch", "diffusers", "transformers"),
)
