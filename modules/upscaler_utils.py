"""Enlarging a picture by a network, under the names that extensions import. The network is called on its own device with pixels 0..1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from modules.pictures.upscaler_models import TileSettings, upscale_in_tiles
from modules.torch_utils import get_param


def pil_image_to_torch_bgr(img: Image.Image) -> torch.Tensor:
    """(3, H, W) in 0..1, blue first."""
    pixels_HWC = np.asarray(img.convert("RGB"), dtype=np.float32)[:, :, ::-1] / 255
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


def torch_bgr_to_pil_image(tensor: torch.Tensor) -> Image.Image:
    """The picture of (3, H, W) or (1, 3, H, W), blue first. Raises ValueError for more than one."""
    if tensor.ndim == 4:
        if tensor.shape[0] != 1:
            raise ValueError(f"{tensor.shape[0]} pictures were given; one is made at a time.")
        tensor = tensor[0]
    if tensor.ndim != 3:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is no picture; (3, H, W) is.")
    values_HWC = tensor.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).movedim(0, -1).flip(-1)
    return Image.fromarray(values_HWC.numpy())


def upscale_pil_patch(model: Callable[[torch.Tensor], torch.Tensor], img: Image.Image) -> Image.Image:
    """The whole picture through `model`, a network with parameters."""
    parameter = get_param(model)  # type: ignore[arg-type]  # any callable module
    with torch.no_grad():
        pixels = pil_image_to_torch_bgr(img).unsqueeze(0).to(device=parameter.device, dtype=parameter.dtype)
        return torch_bgr_to_pil_image(model(pixels))


def upscale_with_model(
    model: Callable[[torch.Tensor], torch.Tensor], img: Image.Image, *, tile_size: int, tile_overlap: int = 0, desc: str = "tiled upscale"
) -> Image.Image:
    """As upscale_pil_patch(), in tiles of `tile_size` pixels; 0 is the whole picture."""
    return upscale_in_tiles(img, TileSettings(side_px=tile_size, overlap_px=tile_overlap), lambda tile: upscale_pil_patch(model, tile))
