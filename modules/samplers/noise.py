"""Noise from seeds, under the names that extensions import. backend/sampling/noise.py generates the numbers.

The default source is the installed application's setting `randn_source`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backend import memory_management
from backend.sampling.noise import ImageNoise, NoiseGenerator, slerp
from modules.jobs.context import installed_context

__all__ = ["ImageRNG", "noise_device", "randn", "randn_local", "randn_without_seed", "slerp"]

# torch has generators only for these kinds
_DEVICES_WITH_GENERATORS = ("cpu", "cuda", "xpu", "mps")


def noise_device() -> torch.device:
    """Where noise of the source "GPU" is generated: the GPU in use, else the CPU."""
    device = memory_management.get_torch_device()
    return device if device.type in _DEVICES_WITH_GENERATORS else torch.device("cpu")


def _setting(name: str) -> object:
    app = installed_context()
    return getattr(app.options, name) if app is not None else {"randn_source": "GPU", "eta_noise_seed_delta": 0}[name]


class ImageRNG(ImageNoise):
    """The noise of a batch: `first()`, then `next()`. Shape (C, H, W) of the latents, one seed per picture."""

    def __init__(
        self,
        shape: Sequence[int],
        seeds: Sequence[int],
        subseeds: Sequence[int] | None = None,
        subseed_strength: float = 0.0,
        seed_resize_from_h: int = 0,
        seed_resize_from_w: int = 0,
        source: str | None = None,
        eta_noise_seed_delta: int | None = None,
    ) -> None:
        super().__init__(
            shape,
            seeds,
            subseeds,
            subseed_strength,
            max(seed_resize_from_h, 0),
            max(seed_resize_from_w, 0),
            source=str(_setting("randn_source")) if source is None else source,
            eta_noise_seed_delta=int(str(_setting("eta_noise_seed_delta") or 0)) if eta_noise_seed_delta is None else eta_noise_seed_delta,
            device=noise_device(),
        )


def randn(seed: int, shape: Sequence[int], generator: NoiseGenerator | None = None) -> Tensor:
    """Normal numbers from `seed`, or from `generator` if given."""
    source = generator or NoiseGenerator(int(seed), str(_setting("randn_source")), noise_device())
    return source.randn(shape)


def randn_local(seed: int, shape: Sequence[int]) -> Tensor:
    """Same as randn(); neither touches a global generator."""
    return randn(seed, shape)


def randn_without_seed(shape: Sequence[int], generator: NoiseGenerator | None = None) -> Tensor:
    """Normal numbers from `generator`, or from torch's global one."""
    return torch.randn(tuple(shape)) if generator is None else generator.randn(shape)


def create_random_tensors(
    shape: Sequence[int],
    seeds: Sequence[int],
    subseeds: Sequence[int] | None = None,
    subseed_strength: float = 0.0,
    seed_resize_from_h: int = 0,
    seed_resize_from_w: int = 0,
    p: object = None,
) -> Tensor:
    """The first noise of each seed, under the name that extensions for old versions import."""
    first: Tensor = ImageRNG(
        tuple(shape),
        list(seeds),
        subseeds=subseeds,
        subseed_strength=subseed_strength,
        seed_resize_from_h=seed_resize_from_h,
        seed_resize_from_w=seed_resize_from_w,
    ).first()
    return first
