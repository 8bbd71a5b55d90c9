"""Enlarged canvases for the outpainting scripts: the picture on a larger canvas, what of it is new, and noise that looks like the picture."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image

DIRECTIONS = ("left", "right", "up", "down")
ROUND_PX = 64
_FADE_PX = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """Pixels added on each side."""

    left: int = 0
    right: int = 0
    up: int = 0
    down: int = 0


def choose_margins(width: int, height: int, directions: Collection[str], pixels: int) -> Margins:
    """`pixels` on each chosen side, and what is missing to multiples of 64 on the last chosen of each pair."""
    sides = {side: pixels if side in directions else 0 for side in DIRECTIONS}
    for length, first, last in ((width, "left", "right"), (height, "up", "down")):
        if sides[first] or sides[last]:
            missing = -(length + sides[first] + sides[last]) % ROUND_PX
            sides[last if sides[last] else first] += missing
    return Margins(**sides)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The picture on a larger canvas; `new` (L) is white where nothing of it is."""

    picture: Image.Image
    new: Image.Image
    margins: Margins

    def mask(self, reach_px: int) -> Image.Image:
        """What is repainted: what is new, and `reach_px` of the picture next to it."""
        mask, margins = Image.new("L", self.picture.size, 255), self.margins
        kept = (
            margins.left + (reach_px if margins.left else 0),
            margins.up + (reach_px if margins.up else 0),
            mask.width - margins.right - (reach_px if margins.right else 0),
            mask.height - margins.down - (reach_px if margins.down else 0),
        )
        if kept[2] > kept[0] and kept[3] > kept[1]:
            mask.paste(0, kept)
        return mask


def enlarge_canvas(picture: Image.Image, margins: Margins) -> Canvas:
    """The edges of the picture are continued into the new part, which is what a mask's fill starts from."""
    pixels = np.asarray(picture.convert("RGB"))
    around = ((margins.up, margins.down), (margins.left, margins.right))
    new = np.pad(np.zeros(pixels.shape[:2], np.uint8), around, constant_values=255)
    return Canvas(picture=Image.fromarray(np.pad(pixels, (*around, (0, 0)), mode="edge")), new=Image.fromarray(new), margins=margins)


def fill_with_matched_noise(canvas: Canvas, *, falloff: float, color_variation: float, seed: int) -> Image.Image:
    """The canvas with noise in its new part: the spectrum of the picture raised to `falloff`, and its colors.

    A spectrum's amplitudes say how coarse a picture's structures are (Heeger and Bergen 1995); its phases, which are drawn, where they are.
    `color_variation` is how much the channels' noise differs. The result is blended into the picture over a few pixels.
    """
    random = np.random.default_rng(seed)
    pixels, new = np.asarray(canvas.picture, dtype=np.float64) / 255, np.asarray(canvas.new) > 0
    known = pixels[~new]
    mean = known.mean(axis=0)
    windowed = (pixels - mean) * _window(*new.shape)[..., None] * ~new[..., None]
    gray = random.standard_normal(new.shape)
    noise = np.empty_like(pixels)
    for channel in range(3):
        drawn = gray * (1 - color_variation) + random.standard_normal(new.shape) * color_variation
        amplitude = np.abs(np.fft.fft2(windowed[..., channel])) ** falloff
        noise[..., channel] = np.fft.ifft2(np.fft.fft2(drawn) * amplitude).real
        noise[..., channel] = _with_values_of(noise[..., channel], known[:, channel])
    share = _grow(new)[..., None]
    return Image.fromarray(np.clip((pixels * (1 - share) + noise * share) * 255, 0, 255).round().astype(np.uint8))


def _window(height: int, width: int) -> np.ndarray:
    window: np.ndarray = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    return window


def _with_values_of(noise: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`noise` mapped monotonically so that it has the distribution of `values`."""
    ranks = noise.ravel().argsort().argsort() / max(1, noise.size - 1)
    mapped: np.ndarray = np.quantile(values, ranks).reshape(noise.shape)
    return mapped


def _grow(new: np.ndarray) -> np.ndarray:
    """1 where `new`, falling to 0 over a few pixels next to it, by the distance along rows and columns."""
    share, reached = new.astype(np.float64), new
    for step in range(1, _FADE_PX):
        around = np.pad(reached, 1)
        reached = reached | around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
        share = np.maximum(share, reached * (1 - step / _FADE_PX))
    return share


def strip_beside(canvas: Canvas, direction: str, depth_px: int) -> tuple[int, int, int, int]:
    """The box that is redrawn for one direction: the new part with as much of the picture as makes it `depth_px` deep, on the whole side."""
    width, height = canvas.picture.size
    depth = min(max(depth_px, getattr(canvas.margins, direction) * 2), width if direction in ("left", "right") else height)
    return {
        "left": (0, 0, depth, height),
        "right": (width - depth, 0, width, height),
        "up": (0, 0, width, depth),
        "down": (0, height - depth, width, height),
    }[direction]


def round_up(length_px: int, step_px: int = 8) -> int:
    """The next multiple of `step_px`."""
    return math.ceil(length_px / step_px) * step_px
