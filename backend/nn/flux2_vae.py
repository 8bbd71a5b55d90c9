"""Flux.2's VAE: diffusers' AutoencoderKLFlux2 with the statistics of its latents as plain numbers, which no change of dtype rounds.

Shapes: C channels of the folded latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

MEAN, VARIANCE = "bn.running_mean", "bn.running_var"
"""Their names in files, where they are buffers of a batch norm."""
EPS = 1e-4


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Of each of the C channels of folded latents, in training."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]

    @classmethod
    def of(cls, mean_C: Tensor, variance_C: Tensor) -> LatentStatistics:
        return cls(tuple(mean_C.float().tolist()), tuple(variance_C.float().tolist()))

    @property
    def scale(self) -> tuple[float, ...]:
        """1 / deviation, as a batch norm computes it."""
        return tuple((value + EPS) ** -0.5 for value in self.variance)

    def to_file(self) -> dict[str, Tensor]:
        return {MEAN: torch.tensor(self.mean), VARIANCE: torch.tensor(self.variance)}


class Flux2VAE(AutoencoderKLFlux2):  # type: ignore[misc]  # the library's class is untyped
    """Its `statistics` are set when it is built from a file. Latents are those of the networks, neither folded nor normalized."""

    statistics: LatentStatistics

    @wraps(AutoencoderKLFlux2.__init__)  # type: ignore[misc]  # the signature that configurations are read by
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.bn


def build_flux2_vae(config: Mapping[str, Any], statistics: LatentStatistics) -> Flux2VAE:
    vae: Flux2VAE = Flux2VAE(**config)
    vae.statistics = statistics
    return vae
