"""Picture conversions between arrays and tensors, with the names and signatures that ControlNet extensions import.

Shapes: H W rows and columns, C channels, B pictures.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

PAD_UNIT_PX = 64
MAX_MAP_PX = 2**26
"""Of a map before it is brought to the size of the job: what one picture of a request may have."""


def HWC3(x: np.ndarray) -> np.ndarray:
    """An 8-bit picture (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as (H, W, 3); transparency becomes white. Raises ValueError for others."""
    if x.dtype != np.uint8:
        raise ValueError(f"HWC3 takes 8-bit pictures (uint8); this one is {x.dtype}. Multiply by 255 and convert it first.")
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4):
        raise ValueError(f"HWC3 takes pictures with 1, 3 or 4 channels; this one has shape {x.shape}.")
    if x.shape[2] == 3:
        return x
    if x.shape[2] == 1:
        return np.concatenate([x, x, x], axis=2)
    color, alpha = x[:, :, :3].astype(np.float32), x[:, :, 3:4].astype(np.float32) / 255.0
    return (color * alpha + 255.0 * (1.0 - alpha)).clip(0, 255).astype(np.uint8)


def numpy_to_pytorch(x: np.ndarray) -> torch.Tensor:
    """A picture (H, W, C), 0..255, as a batch of one (1, H, W, C), 0..1."""
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.float32) / 255.0)[None].copy())


def pytorch_to_numpy(x: torch.Tensor) -> list[np.ndarray]:
    """A batch (B, H, W, C), 0..1, as 8-bit pictures (H, W, C)."""
    return [np.clip(255.0 * picture.detach().cpu().float().numpy(), 0, 255).astype(np.uint8) for picture in x]


def pad64(x: int) -> int:
    """Padding to the next multiple of 64."""
    return -x % PAD_UNIT_PX


def safer_memory(x: np.ndarray) -> np.ndarray:
    """A C-contiguous copy, for libraries that read memory directly."""
    return np.ascontiguousarray(x.copy()).copy()


def resize_image_with_pad(img: np.ndarray, resolution: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """(the picture with its shorter side at `resolution` and both padded to multiples of 64, what cuts the padding off a result of that size).

    A strip whose longer side would get too long for MAX_MAP_PX is made as large as that allows."""
    height_px, width_px = img.shape[:2]
    scale = min(float(resolution) / min(height_px, width_px), (MAX_MAP_PX / (height_px * width_px)) ** 0.5)
    new_height_px, new_width_px = max(1, int(np.round(height_px * scale))), max(1, int(np.round(width_px * scale)))
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    resized = np.asarray(Image.fromarray(HWC3(img)).resize((new_width_px, new_height_px), method))
    padded = np.pad(resized, ((0, pad64(new_height_px)), (0, pad64(new_width_px)), (0, 0)), mode="edge")

    def remove_pad(x: np.ndarray) -> np.ndarray:
        return safer_memory(x[:new_height_px, :new_width_px])

    return safer_memory(padded), remove_pad


def prepare_free_memory(aggressive: bool = False) -> None:
    """Free memory on the devices: cached memory, and with `aggressive` also loaded models."""
    from backend import memory_management

    if aggressive:
        memory_management.unload_all_models()
    memory_management.soft_empty_cache()


def apply_circular_forge(model: Any, tiling_enabled: bool = False) -> None:
    """Kept for extensions that call it; the request controls tiling (`p.tiling`)."""


def lazy_memory_management(model: Any) -> None:
    """Free memory for a torch module that an extension is about to move to a device itself."""
    from backend import memory_management

    needed_bytes = int(memory_management.module_size(model))
    memory_management.free_memory(needed_bytes, memory_management.get_torch_device())


def generate_random_filename(extension: str = ".txt") -> str:
    """A unique name: the time and some random characters."""
    tail = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
    return f"{time.strftime('%Y%m%d_%H%M%S')}_{tail}{extension}"
