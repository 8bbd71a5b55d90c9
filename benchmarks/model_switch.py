"""How long does it take to switch checkpoints and back? A, B, then A again, which is still in main memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import SafetensorsFile
from backend.devices.probing import probe_devices
from benchmarks._checkpoint_files import write_random
from modules.application import Application
from tests.support.applications import installed_application
from tests.support.checkpoints import write_checkpoint
from tools.measure import Bench, Metrics, Variant

MIB = 2**20


class _ReadBytes:
    """Counts the bytes of tensors read from checkpoint files."""

    def __init__(self) -> None:
        self.num_bytes = 0
        read = SafetensorsFile.read

        def counted(file: SafetensorsFile, key: str, **settings: Any) -> torch.Tensor:
            tensor = read(file, key, **settings)
            self.num_bytes += tensor.numel() * file.infos[key].dtype.itemsize
            return tensor

        SafetensorsFile.read = counted  # type: ignore[method-assign,assignment]


def _text(kind: type[nn.Module], width: int, layers: int, activation: str) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        hidden_act=activation, projection_dim=width, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return kind(config)


def _wide_networks() -> tuple[UNet2DConditionModel, AutoencoderKL, list[nn.Module]]:
    """SDXL at two fifths of its width: nearly 1 GB in half precision."""
    unet = UNet2DConditionModel(
        block_out_channels=(128, 256, 512),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 8),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=768 + 512,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 512,
    )
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(64, 128, 256, 256), layers_per_block=2, latent_channels=4, **kinds)
    return unet, vae, [_text(CLIPTextModel, 768, 12, "quick_gelu"), _text(CLIPTextModelWithProjection, 512, 8, "gelu")]


def _write_small(folder: Path) -> None:
    for seed, name in enumerate("AB"):
        write_checkpoint(folder / f"{name}.safetensors", "sd15", seed=seed, dtype=torch.float16)


def _write_wide(folder: Path) -> None:
    with torch.device("meta"):
        networks = _wide_networks()
    for name in "AB":
        write_random(folder / f"{name}.safetensors", "sdxl", networks)


def _forget_file(path: Path) -> None:
    """Drop the file from the system's cache, if possible, so that it is read from disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _switch(app: Application, counter: _ReadBytes, name: str) -> tuple[float, float]:
    """Seconds, and MiB read, until the checkpoint is in use."""
    before, began_s = counter.num_bytes, time.perf_counter()
    app.models.ensure_loaded({**app.options.snapshot(), "sd_model_checkpoint": f"{name}.safetensors"})
    return time.perf_counter() - began_s, (counter.num_bytes - before) / MIB


def _there_and_back(folder: Path, counter: _ReadBytes) -> Metrics:
    config = BackendConfig(device_ids=("cpu",), unet_dtype="fp16", vae_dtype="fp16", clip_dtype="fp16")
    memory_management.configure(config, probe_devices(config))
    files = sorted((folder / "models" / "Stable-diffusion").glob("*.safetensors"))
    for path in files:
        _forget_file(path)
    with installed_application(folder, backend=config, no_hashing=True) as app:
        found = {step: _switch(app, counter, step[0]) for step in ("A", "B", "A again", "B again")}
        rss_mib = psutil.Process().memory_info().rss / MIB
    seconds = {f"{step} s": value for step, (value, _) in found.items()}
    read = {f"{step} MiB read": value for step, (_, value) in found.items()}
    return {**seconds, **read, "file MiB": files[0].stat().st_size / MIB, "RSS with both MiB": rss_mib}


def _make_variants() -> Mapping[str, Variant]:
    torch.set_num_threads(1)
    counter, variants = _ReadBytes(), {}
    for name, write in (("narrow SD1.x", _write_small), ("SDXL, 2/5 of its width", _write_wide)):
        folder = Path(tempfile.mkdtemp())
        (folder / "models" / "Stable-diffusion").mkdir(parents=True)
        write(folder / "models" / "Stable-diffusion")
        variants[name] = partial(_there_and_back, folder, counter)
    return variants


BENCH = Bench(
    question="How long does it take to switch checkpoints, and back? From a fresh start: A and B from their files (which the system was told to "
    "forget), then A and B again, which wait in main memory. fp16 files, stored in fp16 on the CPU; without the hash of a file that is seen first.",
    make_variants=_make_variants,
    baseline="narrow SD1.x",
    num_rounds=5,
    packages=("torch", "diffusers", "transformers"),
)
