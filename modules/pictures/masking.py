"""Mask geometry: crop regions for "only masked", and filling the masked area from its surroundings. PIL and numpy only.

Shapes: H W rows and columns, C color bands."""

from __future__ import annotations

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

_GROUND = 8
"""Values below this count as black: JPEG and careless editors leave backgrounds of 1 to 7."""


def drop_background(mask: Image.Image) -> Image.Image:
    """`mask` (L) with almost black pixels set to black, so that JPEG noise does not count as masked."""
    return mask.point(lambda value: value if value >= _GROUND else 0)


def get_crop_region_v2(mask: Image.Image, pad: int = 0) -> Box | None:
    """The box around everything that is not black, plus `pad` pixels on each side; None for an empty mask."""
    box = mask.getbbox()
    if box is None:
        return None
    x1, y1, x2, y2 = box
    return max(x1 - pad, 0), max(y1 - pad, 0), min(x2 + pad, mask.width), min(y2 + pad, mask.height)


def get_crop_region(mask: Image.Image, pad: int = 0) -> Box:
    """Like get_crop_region_v2, but an empty mask gives an inside-out box, as extensions expect."""
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    box = get_crop_region_v2(image, pad)
    return box if box is not None else (image.width, image.height, 0, 0)


def expand_crop_region(crop_region: Box, processing_width: int, processing_height: int, image_width: int, image_height: int) -> Box:
    """The box expanded to the aspect ratio of the processed size, and shifted to stay inside the picture."""
    x1, y1, x2, y2 = crop_region
    wanted_ratio = processing_width / processing_height
    if (x2 - x1) / max(y2 - y1, 1) > wanted_ratio:
        y1, y2 = _grown(y1, y2, int((x2 - x1) / wanted_ratio), image_height)
    else:
        x1, x2 = _grown(x1, x2, int((y2 - y1) * wanted_ratio), image_width)
    return x1, y1, x2, y2


def _grown(low: int, high: int, wanted: int, limit: int) -> tuple[int, int]:
    """low..high expanded around its center to `wanted`, within 0..limit."""
    missing = wanted - (high - low)
    low, high = low - missing // 2, high + missing - missing // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, min(high - low, limit)
    return low, high


def fill(image: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` (RGB) with the masked area filled with surrounding colors, smoother the farther away they are.

    A mask of another size is stretched. Push-pull interpolation: Gortler et al. 1996, "The Lumigraph", section 3.4.1."""
    mask = mask if mask.size == image.size else mask.resize(image.size)
    known_HW1 = 1 - np.asarray(mask.convert("L"), dtype=np.float32)[..., None] / 255
    colors_HWC = np.asarray(image.convert("RGB"), dtype=np.float32)
    filled = _pull_push(colors_HWC * known_HW1, known_HW1)
    return Image.fromarray(np.clip(np.round(filled), 0, 255).astype(np.uint8))


def _pull_push(weighted_HWC: np.ndarray, known_HW1: np.ndarray) -> np.ndarray:
    """Colors everywhere, from colors multiplied by their weights (0..1), and the weights."""
    height, width = known_HW1.shape[:2]
    if max(height, width) == 1:
        return weighted_HWC / np.maximum(known_HW1, 1e-6)
    half_weighted, half_known = _halved(weighted_HWC), _halved(known_HW1)
    saturation = np.minimum(half_known, 1.0) / np.maximum(half_known, 1e-6)
    coarse_HWC = _pull_push(half_weighted * saturation, half_known * saturation)
    return weighted_HWC + (1 - known_HW1) * _enlarged(coarse_HWC, height, width)


def _halved(values_HWC: np.ndarray) -> np.ndarray:
    """Sums over 2x2 pixels; an odd side repeats its last row."""
    height, width = values_HWC.shape[:2]
    even = np.pad(values_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return even[0::2, 0::2] + even[1::2, 0::2] + even[0::2, 1::2] + even[1::2, 1::2]


def _enlarged(values_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize to this size."""
    bands = [Image.fromarray(np.ascontiguousarray(values_HWC[..., band])) for band in range(values_HWC.shape[-1])]
    return np.stack([np.asarray(band.resize((width, height), resample=Image.Resampling.BILINEAR)) for band in bands], axis=-1)
