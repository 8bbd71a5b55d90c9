"""Resizing and normalizing pictures: the resize modes of img2img, transparency, orientation, bit depth.
Every entry point for pictures (page, API, Extras, ControlNet, folders) uses fix_image. Must not know settings or files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from modules.pictures.upscaler import LANCZOS, UpscalerData

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_WHITE_16, _WHITE_32 = 65535, 2**31 - 1

JUST_RESIZE, CROP_AND_RESIZE, RESIZE_AND_FILL = 0, 1, 2
MAX_BETWEEN_PX = 2**27
"""Of a picture that is cut or shrunk afterwards. A strip of 1 by 5000 would otherwise take gigabytes on its way to a small square."""


def resize_to(image: Image.Image, width_px: int, height_px: int, upscaler: UpscalerData | None = None) -> Image.Image:
    """`image` at exactly this size. An upscaler does the enlarging when a side grows; the rest is Lanczos, and so is all of a strip whose enlarged
    picture would be too large."""
    grows, scale = width_px > image.width or height_px > image.height, max(width_px / image.width, height_px / image.height)
    is_strip = image.width * image.height * scale**2 > max(MAX_BETWEEN_PX, 4 * width_px * height_px)
    if upscaler is not None and upscaler.name != "None" and image.mode != "L" and grows and not is_strip:
        image = upscaler.scaler.upscale(image, scale, upscaler.data_path)
    if image.size == (width_px, height_px):
        return image
    return image.resize((width_px, height_px), resample=LANCZOS)


def resize_by_mode(mode: int, image: Image.Image, width_px: int, height_px: int, upscaler: UpscalerData | None = None) -> Image.Image:
    """`image` at this size: 0 stretches, 1 crops, 2 fits and extends its edges. Raises ValueError for another mode."""
    if mode == JUST_RESIZE:
        return resize_to(image, width_px, height_px, upscaler)
    if mode == CROP_AND_RESIZE:
        return _cover(image, width_px, height_px, upscaler)
    if mode == RESIZE_AND_FILL:
        return _fit_and_continue_edges(image, width_px, height_px, upscaler)
    raise ValueError(f"resize mode {mode} is unknown. Use 0 (just resize), 1 (crop and resize) or 2 (resize and fill).")


def _scaled_size_px(image: Image.Image, width_px: int, height_px: int, *, cover: bool) -> tuple[int, int]:
    """The size of the whole picture scaled to cover the target, or to fit into it."""
    wider = width_px * image.height > height_px * image.width  # compares the target's aspect ratio with the picture's
    if wider == cover:
        return width_px, max(1, image.height * width_px // image.width)
    return max(1, image.width * height_px // image.height), height_px


def _cover(image: Image.Image, width_px: int, height_px: int, upscaler: UpscalerData | None) -> Image.Image:
    covering_px = _scaled_size_px(image, width_px, height_px, cover=True)
    if covering_px[0] * covering_px[1] > max(MAX_BETWEEN_PX, 4 * width_px * height_px):
        seen_width, seen_height = image.width * width_px / covering_px[0], image.height * height_px / covering_px[1]
        left, top = (image.width - seen_width) / 2, (image.height - seen_height) / 2
        return image.resize((width_px, height_px), resample=LANCZOS, box=(left, top, left + seen_width, top + seen_height))
    resized = resize_to(image, *covering_px, upscaler)
    result = Image.new(image.mode, (width_px, height_px))
    result.paste(resized, ((width_px - resized.width) // 2, (height_px - resized.height) // 2))
    return result


def _fit_and_continue_edges(image: Image.Image, width_px: int, height_px: int, upscaler: UpscalerData | None) -> Image.Image:
    resized = resize_to(image, *_scaled_size_px(image, width_px, height_px, cover=False), upscaler)
    result = Image.new(image.mode, (width_px, height_px))
    left, top = (width_px - resized.width) // 2, (height_px - resized.height) // 2
    result.paste(resized, (left, top))
    right, bottom = left + resized.width, top + resized.height
    if top or bottom < height_px:
        _paste_stretched(result, (0, top, width_px, top + 1), (0, 0, width_px, top))
        _paste_stretched(result, (0, bottom - 1, width_px, bottom), (0, bottom, width_px, height_px))
    if left or right < width_px:
        _paste_stretched(result, (left, 0, left + 1, height_px), (0, 0, left, height_px))
        _paste_stretched(result, (right - 1, 0, right, height_px), (right, 0, width_px, height_px))
    return result


def _paste_stretched(image: Image.Image, source: tuple[int, int, int, int], target: tuple[int, int, int, int]) -> None:
    """Stretch one row or column of `image` over an adjacent band."""
    size_px = (target[2] - target[0], target[3] - target[1])
    if min(size_px) > 0:
        image.paste(image.crop(source).resize(size_px, resample=Image.Resampling.NEAREST), target[:2])


def flatten(img: Image.Image, bgcolor: str) -> Image.Image:
    """`img` as RGB with its transparent parts on `bgcolor`."""
    img = plain(img)
    if img.mode == "RGBA":
        background = Image.new("RGBA", img.size, bgcolor)
        background.alpha_composite(img)
        img = background
    return img.convert("RGB")


def with_alpha_channel(image: Image.Image) -> Image.Image:
    """`image` as RGBA if it has transparency in any form; otherwise unchanged."""
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Pixel values of any type as uint8: 16 and 32 bits are scaled (not clipped to white); floats are 0..1, 0..255 or 0..65535, whichever fits.

    int64 [0, 128, 65535] becomes [0, 0, 255]; float [0, 0.5, 1] becomes [0, 128, 255]."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    scaled = numbers * (255.0 / _white_of(values.dtype, float(numbers.max(initial=0.0))))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _white_of(dtype: np.dtype[Any], largest: float) -> float:
    """The value for white. 16-bit integers determine it by type; wider integers and floats by their values."""
    if dtype.itemsize == 2 and dtype.kind in "iu":
        return float(np.iinfo(dtype).max)
    if dtype.kind == "f" and largest <= 1.0:
        return 1.0
    if largest <= 255:
        return 255
    return _WHITE_16 if largest <= _WHITE_16 else max(_WHITE_32, largest)


def shallow(image: Image.Image) -> Image.Image:
    """`image` with 8 bits per channel: gray of 16 or 32 bits (PNG, TIFF) is scaled, where Pillow would clip everything above 255 to white."""
    if image.mode not in _DEEP_MODES:
        return image
    values = np.asarray(image)
    grey = Image.fromarray(to_8_bit(values))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    key = image.info.get("transparency")
    if isinstance(key, int):  # one gray level is transparent
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    return grey


def plain(image: Image.Image) -> Image.Image:
    """`image` with 8 bits per channel; transparency only as an alpha channel."""
    return with_alpha_channel(shallow(image))


def fix_image(image: Image.Image | None) -> Image.Image | None:
    """`image` rotated per its EXIF orientation, 8 bits per channel, with palette transparency as an alpha channel."""
    if image is None:
        return None
    turned = ImageOps.exif_transpose(image)
    return plain(turned if turned is not None else image)
