"""Noise per image from seeds: the initial noise, the noise added during sampling, variations, and Brownian paths.

Every image has its own generators, so that a picture does not depend on its position in the batch. Must not know samplers, options or jobs.

Shapes: B batch, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backend.sampling.brownian import BrownianPath
from backend.sampling.philox import PhiloxGenerator
from backend.sampling.sampler_types import BrownianNoise

SOURCES = ("GPU", "CPU", "NV")
PIXELS_PER_LATENT = 8


class NoiseGenerator:
    """A stream of normal numbers from one seed. "CPU": torch on the host; "GPU": torch on `device`; "NV": a CUDA GPU's numbers, made on the host."""

    def __init__(self, seed: int, source: str, device: torch.device) -> None:
        self._device = torch.device("cpu") if source == "CPU" or device.type == "mps" else device
        self._philox = PhiloxGenerator(seed) if source == "NV" else None
        self._torch = None if source == "NV" else torch.Generator(self._device).manual_seed(_as_torch_seed(seed))

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Normal numbers, fp32, on the source's device."""
        if self._philox is not None:
            return torch.from_numpy(self._philox.randn(shape))
        return torch.randn(tuple(shape), generator=self._torch, device=self._device)


class ImageNoise:
    """The noise of a batch of images. `first()` returns the initial noise, `next()` the following; both are (B, C, H, W) fp32 on `device`.

    `shape`: (C, H, W). `subseeds` with a `subseed_strength` above 0 move each initial noise toward another seed's (a variation).
    `seed_resize_from_h` and `_w` (pixels): use the initial noise of a picture of that size, cut or placed in the middle. `eta_noise_seed_delta`:
    added to the seeds for all noise after the first. `brownian_range`: noise levels that Brownian paths always span, so that a shortened
    schedule (img2img) gets the path of the full one.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        subseeds: Sequence[int] | None = None,
        subseed_strength: float = 0.0,
        seed_resize_from_h: int = 0,
        seed_resize_from_w: int = 0,
        source: str = "GPU",
        eta_noise_seed_delta: int = 0,
        *,
        device: torch.device | str = "cpu",
        brownian_range: tuple[float, float] | None = None,
    ) -> None:
        if source not in SOURCES:
            raise ValueError(f"Noise source {source!r} is unknown. Use one of {', '.join(SOURCES)}.")
        if len(shape) != 3:
            raise ValueError(f"Noise of shape {tuple(shape)} was requested. Give (channels, rows, columns) of one image.")
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.seeds = [int(seed) for seed in seeds]
        self.subseeds = [int(seed) for seed in subseeds or ()]
        self.subseed_strength = subseed_strength
        self.source = source
        self.device = torch.device(device)
        self.eta_noise_seed_delta = eta_noise_seed_delta
        self.brownian_range = brownian_range
        from_h, from_w = int(seed_resize_from_h) // PIXELS_PER_LATENT, int(seed_resize_from_w) // PIXELS_PER_LATENT
        self._start_shape = (self.shape[0], from_h, from_w) if from_h > 0 and from_w > 0 else self.shape
        self._generators = [self._generator(seed) for seed in self.seeds]
        self._is_first = True

    def first(self) -> Tensor:
        """The initial noise of each image."""
        self._is_first = False
        starts = [self._start(index, seed) for index, seed in enumerate(self.seeds)]
        if self.eta_noise_seed_delta:
            self._generators = [self._generator(seed + self.eta_noise_seed_delta) for seed in self.seeds]
        return torch.stack(starts).to(self.device)

    def next(self, x_BCHW: Tensor | None = None) -> Tensor:
        """The next noise of each image; the first call is like `first()`. With `x_BCHW`, in its dtype and on its device.

        Raises: ValueError if `x_BCHW` has a different shape than this noise.
        """
        noise_BCHW = self.first() if self._is_first else torch.stack([generator.randn(self.shape) for generator in self._generators])
        if x_BCHW is None:
            return noise_BCHW.to(self.device)
        self._check_shape(x_BCHW)
        return noise_BCHW.to(x_BCHW)

    def brownian(self, x_BCHW: Tensor, sigma_min: float, sigma_max: float) -> BrownianNoise:
        """A function (sigma, sigma_next) -> unit noise, from one Brownian path per image with the image's seed."""
        self._check_shape(x_BCHW)
        low, high = self.brownian_range or (sigma_min, sigma_max)
        if not low < high:  # a schedule with one level never uses the path
            high = low + 1.0
        paths = [BrownianPath(low, high, abs(seed), lambda node_seed: self._generator(node_seed).randn(self.shape)) for seed in self.seeds]

        def between(sigma: float, sigma_next: float) -> Tensor:
            start, stop, sign = (sigma, sigma_next, 1.0) if sigma < sigma_next else (sigma_next, sigma, -1.0)
            change_BCHW = torch.stack([path.increment(start, stop) for path in paths]).to(x_BCHW)
            return change_BCHW * (sign / math.sqrt(stop - start))

        return between

    def of_image(self, index: int) -> ImageNoise:
        """The noise of one image of the batch. It shares that image's generators, so the batch's noise continues where this one stops."""
        one = copy.copy(self)
        one.seeds, one._generators = self.seeds[index : index + 1], self._generators[index : index + 1]
        one.subseeds = self.subseeds[index : index + 1]
        return one

    def _check_shape(self, x_BCHW: Tensor) -> None:
        if tuple(x_BCHW.shape) != (len(self.seeds), *self.shape):
            raise ValueError(
                f"Noise for latents of shape {tuple(x_BCHW.shape)} was requested from a source of shape {(len(self.seeds), *self.shape)}. "
                "Make the source with the latents' shape and one seed per image."
            )

    def _generator(self, seed: int) -> NoiseGenerator:
        return NoiseGenerator(seed, self.source, self.device)

    def _start(self, index: int, seed: int) -> Tensor:
        is_resized = self._start_shape != self.shape
        start = (self._generator(seed) if is_resized else self._generators[index]).randn(self._start_shape)
        if self.subseeds and self.subseed_strength != 0:
            subseed = self.subseeds[index] if index < len(self.subseeds) else 0
            start = slerp(self.subseed_strength, start, self._generator(subseed).randn(self._start_shape))
        return _set_into_middle(self._generators[index].randn(self.shape), start) if is_resized else start


def slerp(share: float, low_CHW: Tensor, high_CHW: Tensor) -> Tensor:
    """Spherical interpolation along the rows: `share` 0 returns `low`, 1 returns `high`. Shoemake 1985, eq. 11; linear if nearly parallel."""
    low_unit, high_unit = low_CHW / low_CHW.norm(dim=1, keepdim=True), high_CHW / high_CHW.norm(dim=1, keepdim=True)
    cosine = (low_unit * high_unit).sum(dim=1, keepdim=True)
    if cosine.mean() > 0.9995:
        return low_CHW + (high_CHW - low_CHW) * share
    angle = cosine.acos()
    turned_CHW: Tensor = ((angle * (1.0 - share)).sin() * low_CHW + (angle * share).sin() * high_CHW) / angle.sin()
    return turned_CHW


def _set_into_middle(whole_CHW: Tensor, part_CHW: Tensor) -> Tensor:
    """`whole` with `part` placed in its middle. A part that is too large is cut on both sides."""
    result = whole_CHW.clone()
    into, out_of = [slice(None)], [slice(None)]
    for whole, part in zip(whole_CHW.shape[1:], part_CHW.shape[1:]):
        offset = abs(whole - part) // 2 if whole >= part else -((part - whole + 1) // 2)
        length = part if offset >= 0 else part + 2 * offset
        into.append(slice(max(offset, 0), max(offset, 0) + length))
        out_of.append(slice(max(-offset, 0), max(-offset, 0) + length))
    result[tuple(into)] = part_CHW[tuple(out_of)]
    return result


def _as_torch_seed(seed: int) -> int:
    """The seed as torch accepts it (-2^63 to 2^64 - 1). Others wrap around."""
    return seed if -(2**63) <= seed < 2**64 else seed % 2**64
