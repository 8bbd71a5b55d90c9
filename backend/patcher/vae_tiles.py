"""Applies a picture function tile by tile and blends the seams. Knows no VAE, only how many output pixels one input pixel makes.

Shapes: B batch, C channels, H, W of the input; h, w of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tile width and height and their overlap, in input pixels."""

    tile_w: int
    tile_h: int
    overlap: int

    def variants(self) -> tuple[Tiling, Tiling, Tiling]:
        """The tiling itself, one with flatter and one with taller tiles of the same area. Averaging the three hides the remaining seams."""
        return (
            self,
            Tiling(tile_w=self.tile_w * 2, tile_h=self.tile_h // 2, overlap=self.overlap),
            Tiling(tile_w=self.tile_w // 2, tile_h=self.tile_h * 2, overlap=self.overlap),
        )


def run_tiled(
    function: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    tiling: Tiling,
    *,
    scale: Fraction,
    out_channels: int,
    output_device: torch.device,
) -> Tensor:
    """`function` applied to overlapping tiles of `x_BCHW`, fp32 on `output_device`.

    Each tile fades in over its overlap from every inner border, and the sum is divided by the sum of the fades. So a function that acts on each pixel
    alone gives the same result as on the whole picture. `scale`: output pixels per input pixel (8 for a decoder, 1/8 for an encoder). Processes one
    picture at a time.
    """
    _, _, height, width = x_BCHW.shape
    out_shape = (out_channels, int(height * scale), int(width * scale))
    pictures = [_run_one(function, x_BCHW[index : index + 1], tiling, scale, out_shape, output_device) for index in range(x_BCHW.shape[0])]
    return torch.cat(pictures)


def _run_one(
    function: Callable[[Tensor], Tensor], x_1CHW: Tensor, tiling: Tiling, scale: Fraction, out_shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    channels, out_height, out_width = out_shape
    summed_1Chw = torch.zeros((1, channels, out_height, out_width), device=device)
    weights_11hw = torch.zeros((1, 1, out_height, out_width), device=device)
    _, _, height, width = x_1CHW.shape
    for top, bottom in spans(height, tiling.tile_h, tiling.overlap):
        for left, right in spans(width, tiling.tile_w, tiling.overlap):
            tile_1Chw = function(x_1CHW[:, :, top:bottom, left:right]).to(device=device, dtype=torch.float32)
            fade_hw = _fade(tile_1Chw.shape[-2], int(tiling.overlap * scale), starts=top == 0, ends=bottom == height)[:, None] * _fade(
                tile_1Chw.shape[-1], int(tiling.overlap * scale), starts=left == 0, ends=right == width
            )
            fade_hw = fade_hw.to(device)
            y, x = int(top * scale), int(left * scale)
            area = (..., slice(y, y + tile_1Chw.shape[-2]), slice(x, x + tile_1Chw.shape[-1]))
            summed_1Chw[area] += tile_1Chw * fade_hw
            weights_11hw[area] += fade_hw
    return summed_1Chw / weights_11hw


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, end) of tiles that cover `length`, each `tile` long if there is room, with neighbors sharing at least `overlap`.

    The last tile is moved back instead of being shorter, so that every tile gives the network as much context as possible.
    """
    if tile >= length:
        yield 0, length
        return
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += max(1, tile - overlap)
    yield length - tile, length


def _fade(length: int, overlap: int, *, starts: bool, ends: bool) -> Tensor:
    """Weights along one dim: rising over `overlap` from a border to a neighbor, 1 elsewhere, never 0."""
    weights = torch.ones(length)
    ramp = (torch.arange(min(overlap, length), dtype=torch.float32) + 1) / (overlap + 1)
    if not starts:
        weights[: len(ramp)] *= ramp
    if not ends:
        weights[length - len(ramp) :] *= ramp.flip(0)
    return weights
