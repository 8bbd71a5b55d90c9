"""How far are the estimates of working memory from the counted bytes? Full-size SD1.5 and SDXL, 256 to 1024 pixels; narrow ones on a virtual GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from backend.devices import virtual_gpu
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.vae import VAE
from benchmarks._live_bytes import count_live_bytes
from tests.support.checkpoints import build_models
from tools.measure import Bench, Metrics, Variant

MIB = 2**20
SIZES_PX = (256, 512, 768, 1024)
NARROW_PX = 256
_COMMON = {"sample_size": 64, "in_channels": 4, "layers_per_block": 2}
UNETS: Mapping[str, Mapping[str, Any]] = {
    "SD1.5": {
        **_COMMON,
        "cross_attention_dim": 768,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
    },
    "SDXL": {
        **_COMMON,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE_CONFIG: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def _compare(predicted_bytes: float, counted_bytes: int) -> Metrics:
    return {"counted MiB": counted_bytes / MIB, "estimated MiB": predicted_bytes / MIB, "estimated / counted": predicted_bytes / counted_bytes}


@torch.no_grad()
def _count_on_meta(run: Callable[[], object]) -> int:
    with count_live_bytes() as counter:
        run()
    return counter.peak_bytes


@torch.no_grad()
def _count_on_virtual_gpu(run: Callable[[], object]) -> int:
    device = virtual_gpu.get_device(0)
    device.reset_peak()
    live_bytes = device.live_bytes
    run()
    return device.peak_bytes - live_bytes


def _step(network: KModel, side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """One guided forward: two rows."""
    config: Any = network.diffusion_model.config
    vector_width = config.projection_class_embeddings_input_dim
    y_BV = None if vector_width is None else torch.zeros(2, vector_width, dtype=dtype, device=device)
    x_BCHW, sigma_B = torch.zeros(2, 4, side, side, device=device), torch.ones(2, device=device)
    context_BLD = torch.zeros(2, 77, config.cross_attention_dim, dtype=dtype, device=device)
    return lambda: network.apply_model(x_BCHW, sigma_B, c_crossattn=context_BLD, y=y_BV)


def _unet_on_meta(name: str, size_px: int) -> Metrics:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name]).eval().requires_grad_(False)
        network = KModel(unet, Prediction(), storage_dtype=torch.float16)
    side = size_px // 8
    counted_bytes = _count_on_meta(_step(network, side, torch.device("meta"), torch.float16))
    return _compare(network.memory_required([2, 4, side, side]), counted_bytes)


def _vae_on_meta(part: str, size_px: int) -> Metrics:
    with torch.device("meta"):
        network = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    vae = VAE(network, device=torch.device("cpu"), dtype=torch.float16)
    return _compare(*_vae_bytes(vae, network, part, size_px, torch.device("meta"), torch.float16, _count_on_meta))


def _vae_bytes(
    vae: VAE, network: Any, part: str, size_px: int, device: torch.device, dtype: torch.dtype, count: Callable[[Callable[[], object]], int]
) -> tuple[float, int]:
    side = size_px // 8
    if part == "decode":
        latents_BCHW = torch.zeros(1, 4, side, side, dtype=dtype, device=device)
        return vae.memory_used_decode((side, side), dtype), count(lambda: network.decode(latents_BCHW))
    pixels_BCHW = torch.zeros(1, 3, size_px, size_px, dtype=dtype, device=device)
    return vae.memory_used_encode((size_px, size_px), dtype), count(lambda: network.encode(pixels_BCHW))


def _narrow_unet(family: str) -> Metrics:
    (device,) = virtual_gpu.install((2**30,))
    network = KModel(build_models(Path("none"), family).unet, Prediction()).to(device)
    side = NARROW_PX // 8
    return _compare(network.memory_required([2, 4, side, side]), _count_on_virtual_gpu(_step(network, side, device, torch.float32)))


def _narrow_vae(part: str) -> Metrics:
    (device,) = virtual_gpu.install((2**30,))
    network = build_models(Path("none"), "sd15").vae.to(device)
    vae = VAE(network, device=device, dtype=torch.float32)
    return _compare(*_vae_bytes(vae, network, part, NARROW_PX, device, torch.float32, _count_on_virtual_gpu))


def _make_variants() -> Mapping[str, Variant]:
    torch.set_num_threads(1)
    variants: dict[str, Variant] = {}
    for name in UNETS:
        variants.update({f"{name} UNet, {size} px": partial(_unet_on_meta, name, size) for size in SIZES_PX})
    for part in ("decode", "encode"):
        variants.update({f"VAE {part}, {size} px": partial(_vae_on_meta, part, size) for size in SIZES_PX})
    variants.update({f"narrow {family} UNet, virtual GPU": partial(_narrow_unet, family) for family in ("sd15", "sdxl")})
    variants.update({f"narrow VAE {part}, virtual GPU": partial(_narrow_vae, part) for part in ("decode", "encode")})
    return variants


BENCH = Bench(
    question="How far are the estimates of working memory from the counted bytes? Full-size SD1.5 and SDXL (UNet: one guided step, 2 rows; VAE: one "
    "picture; fp16) on the meta device, where tensors have sizes and no memory, attention counted as a fused kernel; and the narrow networks of the "
    "tests in fp32 at 256 px on a virtual GPU, which counts what really lives. Scratch memory inside kernels is in neither count. Times are those "
    "of counting.",
    make_variants=_make_variants,
    baseline="SD1.5 UNet, 256 px",
    num_rounds=1,
    num_warmups=0,
    packages=("torch", "diffusers"),
)
