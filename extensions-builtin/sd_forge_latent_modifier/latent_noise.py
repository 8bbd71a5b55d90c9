"""Kinds of noise for the latent modifier, by picture: mean 0 and standard deviation 1. Knows no page.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

PERLIN_CELL = 4
"""Latents between two gradients."""
CADS_START, CADS_END = 0.6, 0.9
"""Shares of the noise schedule between which CADS fades in (0 is no noise)."""


def make_noise(kind: str, like_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Noise of a kind for each picture from its generator (on the host), on the device of `like_BCHW`."""
    shape = (like_BCHW.shape[1], like_BCHW.shape[2], like_BCHW.shape[3])
    pictures = [_standard(KINDS[kind](shape, generator)) for _, generator in zip(range(like_BCHW.shape[0]), generators, strict=True)]
    return torch.stack(pictures).to(like_BCHW)


def _standard(noise_CHW: Tensor) -> Tensor:
    return (noise_CHW - noise_CHW.mean()) / noise_CHW.std().clamp(min=1e-10)


def _gaussian(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def _of_spectrum(power: float) -> Callable[[tuple[int, int, int], torch.Generator], Tensor]:
    """Noise whose amplitude falls with that power of the frequency."""

    def make(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        rows, columns = torch.fft.fftfreq(shape[1])[:, None], torch.fft.fftfreq(shape[2])[None, :]
        frequency = (rows**2 + columns**2).sqrt()
        frequency[0, 0] = 1.0
        return torch.fft.ifft2(torch.fft.fft2(_gaussian(shape, generator)) / frequency**power).real

    return make


def _perlin(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Perlin 2002: at each place the mean of what the gradients at the four corners of its cell say, weighted by a smooth step."""
    channels, height, width = shape
    cells = (height - 1) // PERLIN_CELL + 2, (width - 1) // PERLIN_CELL + 2
    angle = torch.rand((channels, *cells), generator=generator) * 2 * math.pi
    down, across = (torch.arange(side, dtype=torch.float32) / PERLIN_CELL for side in (height, width))
    top, left = down.floor().long(), across.floor().long()
    in_cell_down, in_cell_across = (down - top)[:, None], (across - left)[None, :]
    total = torch.zeros(shape)
    for row in (0, 1):
        for column in (0, 1):
            corner = angle[:, top[:, None] + row, left[None, :] + column]
            slope = torch.cos(corner) * (in_cell_across - column) + torch.sin(corner) * (in_cell_down - row)
            total += slope * _fade(1 - (in_cell_down - row).abs()) * _fade(1 - (in_cell_across - column).abs())
    return total


def _fade(x: Tensor) -> Tensor:
    return x * x * x * (x * (x * 6 - 15) + 10)


def _pyramid(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Kasiopy 2023: noise plus ever coarser noise, each level 0.9 times the one before and 2 to 4 times as coarse."""
    channels, height, width = shape
    total = _gaussian(shape, generator)
    rows, columns, strength = float(height), float(width), 1.0
    while min(rows, columns) > 1:
        step = 2 + 2 * float(torch.rand((), generator=generator))
        rows, columns, strength = max(1.0, rows / step), max(1.0, columns / step), strength * 0.9
        coarse = torch.randn((1, channels, int(rows), int(columns)), generator=generator)
        total += strength * functional.interpolate(coarse, (height, width), mode="nearest-exact")[0]
    return total


KINDS: Mapping[str, Callable[[tuple[int, int, int], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "uniform": _uniform,
    "perlin": _perlin,
    "pink": _of_spectrum(1.0),
    "green": _of_spectrum(0.5),
    "pyramid": _pyramid,
}


def without_strong_frequencies(noise_BCHW: Tensor, limit: float) -> Tensor:
    """Without the frequencies whose amplitude reaches `limit`."""
    spectrum = torch.fft.fft2(noise_BCHW.float())
    return torch.fft.ifft2(torch.where(spectrum.abs() < limit, spectrum, torch.zeros_like(spectrum))).real.to(noise_BCHW.dtype)


def add_as_cads(v_BCHW: Tensor, noise_BCHW: Tensor, progress_B111: Tensor, strength: float, rescales: bool) -> Tensor:
    """sqrt(g) v + strength sqrt(1 - g) noise, where g goes from 0 to 1 as the noise level falls from 0.9 to 0.6 of the schedule.

    Sadat et al., "CADS" (2023), equations 4 to 6, on predictions instead of conditions. Rescaled: with the mean and deviation of v.
    """
    known = ((progress_B111 - (1 - CADS_END)) / (CADS_END - CADS_START)).clamp(0, 1)
    mixed = known.sqrt() * v_BCHW + strength * (1 - known).sqrt() * noise_BCHW
    if not rescales:
        return mixed
    dims = (1, 2, 3)
    deviation = mixed.std(dim=dims, keepdim=True).clamp(min=1e-10)
    return (mixed - mixed.mean(dim=dims, keepdim=True)) / deviation * v_BCHW.std(dim=dims, keepdim=True) + v_BCHW.mean(dim=dims, keepdim=True)
