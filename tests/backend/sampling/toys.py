"""Denoisers and noise for sampler tests: problems with known solutions, and a noise source that reads one torch generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.sampling.sampler_types import BrownianNoise

MEAN, SPREAD = 0.7, 0.5


def denoise_gaussian(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """E[x0 | x] for normal x0 with MEAN and SPREAD. Linear, so the probability flow has a closed form."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return (SPREAD**2 * x_BCHW + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def flow_gaussian(x_BCHW: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The result of the probability flow of `denoise_gaussian`: distances from the mean shrink with the marginal's deviation."""
    return MEAN + (x_BCHW - MEAN) * math.sqrt((SPREAD**2 + sigma_next**2) / (SPREAD**2 + sigma**2))


def denoise_two_peaks(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """E[x0 | x] for x0 near -1 or +1 (deviation 0.3): smooth, not linear."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    variance = 0.09 + sigma**2
    side = torch.tanh(x_BCHW / variance)
    return (0.09 * x_BCHW + sigma**2 * side) / variance


@dataclass
class OneStream:
    """Noise from one torch generator, drawn one tensor after the other like a library does."""

    generator: torch.Generator
    draw_dtype: torch.dtype | None = None
    brownian_noise: Callable[[Tensor, float, float], BrownianNoise] | None = None

    def next(self, x_BCHW: Tensor) -> Tensor:
        return torch.randn(x_BCHW.shape, generator=self.generator, dtype=self.draw_dtype or x_BCHW.dtype).to(x_BCHW)

    def brownian(self, x_BCHW: Tensor, sigma_min: float, sigma_max: float) -> BrownianNoise:
        if self.brownian_noise is not None:
            return self.brownian_noise(x_BCHW, sigma_min, sigma_max)
        return lambda sigma, sigma_next: self.next(x_BCHW)


def one_stream(seed: int = 0, draw_dtype: torch.dtype | None = None) -> OneStream:
    return OneStream(torch.Generator().manual_seed(seed), draw_dtype)
