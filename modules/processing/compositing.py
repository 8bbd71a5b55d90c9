"""Pixel work before and after sampling: masks, pasting back over the original, color matching. PIL and numpy only; no settings, no model."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageChops

from modules.pictures.masking import Box

PasteBox = tuple[int, int, int, int]
"""x, y, width, height of the area a crop was taken from."""

_BLUR_SIGMAS = 2.5


def create_binary_mask(image: Image.Image, round: bool = True) -> Image.Image:
    """The mask in `image`: its alpha channel if it has one (thresholded if `round`), else its brightness with grays kept, as in Forge."""
    if image.mode == "RGBA" and image.getextrema()[-1] != (255, 255):
        alpha = image.split()[-1].convert("L")
        return alpha.point(lambda value: 255 if value > 128 else 0) if round else alpha
    return image.convert("L")


def blur_mask(mask: Image.Image, radius_x: float, radius_y: float) -> Image.Image:
    """Gaussian blur with a radius (standard deviation in pixels) per direction; the kernel spans 2.5 deviations."""
    values = np.asarray(mask.convert("L"), dtype=np.float32)
    for axis, sigma in ((1, radius_x), (0, radius_y)):
        if sigma > 0:
            values = _blur_along(values, sigma, axis)
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def _blur_along(values: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    reach = int(_BLUR_SIGMAS * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    padding = [(0, 0), (0, 0)]
    padding[axis] = (reach, reach)
    padded = np.pad(values, padding, mode="reflect" if values.shape[axis] > reach else "edge")
    length = values.shape[axis]
    blurred = np.zeros(values.shape, dtype=np.float64)
    for shift, weight in enumerate(weights):
        blurred += padded.take(range(shift, shift + length), axis=axis) * weight
    return blurred


def overlay_of(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The overlay for the result: `image` (RGBA) where `mask` is black, transparent where it is white."""
    overlay = Image.new("RGBa", image.size)
    overlay.paste(image.convert("RGBA").convert("RGBa"), mask=ImageChops.invert(mask.convert("L")))
    return overlay.convert("RGBA")


def uncrop(image: Image.Image, size_px: tuple[int, int], paste_to: PasteBox) -> Image.Image:
    """`image` placed at its original position in an empty RGBA picture of the original's size."""
    x, y, width, height = paste_to
    base = Image.new("RGBA", size_px)
    base.paste(_stretched(image, width, height), (x, y))
    return base


def apply_overlay(image: Image.Image, paste_loc: PasteBox | None, overlay: Image.Image | None) -> tuple[Image.Image, Image.Image]:
    """(the result with the untouched parts of the original on top, the result alone at its position)."""
    if overlay is None:
        return image, image.copy()
    placed = image if paste_loc is None else uncrop(image, overlay.size, paste_loc)
    original_denoised = placed.copy()
    composed = placed.convert("RGBA")
    composed.alpha_composite(overlay)
    return composed.convert("RGB"), original_denoised


def _stretched(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resample=Image.Resampling.LANCZOS)


def paste_box(crop: Box) -> PasteBox:
    x1, y1, x2, y2 = crop
    return x1, y1, x2 - x1, y2 - y1


# Colors

# CIE standard illuminant D65, 2 degrees; IEC 61966-2-1 defines the matrix from linear sRGB
_RGB_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
_WHITE = np.array([0.95047, 1.0, 1.08883])
_LAB_EPSILON, _LAB_KAPPA = 216 / 24389, 24389 / 27


def setup_color_correction(image: Image.Image) -> np.ndarray:
    """The colors to match: `image` as CIE L*a*b*, float32 HWC."""
    return rgb_to_lab(np.asarray(image.convert("RGB")))


def apply_color_correction(correction: np.ndarray, original_image: Image.Image) -> Image.Image:
    """`original_image` with the L*a*b* histograms of `correction`; its luminosity is blended back in to keep detail."""
    pixels = rgb_to_lab(np.asarray(original_image.convert("RGB")))
    matched = np.stack([_match_histogram(pixels[..., band], correction[..., band]) for band in range(3)], axis=-1)
    recolored = Image.fromarray(lab_to_rgb(matched))
    return _with_luminosity_of(recolored, original_image.convert("RGB"))


def _match_histogram(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`values` mapped monotonically so that their distribution matches that of `target`."""
    _, inverse, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    target_unique, target_counts = np.unique(target.ravel(), return_counts=True)
    quantiles = np.cumsum(counts) / values.size
    target_quantiles = np.cumsum(target_counts) / target.size
    return np.interp(quantiles, target_quantiles, target_unique)[inverse].reshape(values.shape)


def _with_luminosity_of(colors: Image.Image, light: Image.Image) -> Image.Image:
    """The hue and saturation of `colors` with the luminosity of `light` (W3C Compositing and Blending Level 1, 10.1.4)."""
    weights = np.array([0.3, 0.59, 0.11])
    base, source = np.asarray(light, dtype=np.float64) / 255, np.asarray(colors, dtype=np.float64) / 255
    mixed = source + ((base - source) @ weights)[..., None]
    luminosity = (mixed @ weights)[..., None]
    low, high = mixed.min(axis=-1, keepdims=True), mixed.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        mixed = np.where(low < 0, luminosity + (mixed - luminosity) * luminosity / (luminosity - low), mixed)
        mixed = np.where(high > 1, luminosity + (mixed - luminosity) * (1 - luminosity) / (high - luminosity), mixed)
    return Image.fromarray(np.clip(np.round(mixed * 255), 0, 255).astype(np.uint8))


def rgb_to_lab(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 HWC to CIE L*a*b* (D65), float32 HWC."""
    encoded = pixels.astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratios = linear @ _RGB_TO_XYZ.T / _WHITE
    f = np.where(ratios > _LAB_EPSILON, np.cbrt(ratios), (_LAB_KAPPA * ratios + 16) / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return lab.astype(np.float32)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) HWC to sRGB uint8 HWC; out-of-gamut colors are clipped."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    ratios = np.where(f**3 > _LAB_EPSILON, f**3, (116 * f - 16) / _LAB_KAPPA)
    linear = np.clip(ratios * _WHITE @ np.linalg.inv(_RGB_TO_XYZ).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.clip(np.round(encoded * 255), 0, 255).astype(np.uint8)


# Sizes


def old_hires_fix_first_pass_dimensions(width: int, height: int) -> tuple[int, int]:
    """First pass size of hires fix in old versions: about 512x512 pixels in the final aspect ratio, sides rounded up to multiples of 64."""
    scale = math.sqrt(512 * 512 / (width * height))
    return math.ceil(scale * width / 64) * 64, math.ceil(scale * height / 64) * 64
