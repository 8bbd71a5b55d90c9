"""Soft inpainting: half masked places are half repainted in each step, and in the end the original shows where little has changed. Knows no page.

Source: CodeHatchling, "Soft inpainting" (A1111 pull request 14208, 2023); the formulas are in the docstrings.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WINDOW_REACH, _WINDOW_SIGMA = 2, 1.5
"""Of the neighborhood in which changes are ranked."""
_HALF = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftInpainting:
    """The values of the panel."""

    mask_blend_power: float = 1.0
    mask_blend_scale: float = 0.5
    inpaint_detail_preservation: float = 4.0
    composite_mask_influence: float = 0.0
    composite_difference_threshold: float = 0.5
    composite_difference_contrast: float = 2.0

    def share_of_new(self, nmask: Tensor, sigma: float) -> Tensor:
        """nmask ** (scale sigma ** power): how much of the new picture a step keeps. `nmask` is 1 where everything is repainted."""
        return nmask.clamp(0, 1) ** (self.mask_blend_scale * sigma**self.mask_blend_power)

    def blend(self, original_BCHW: Tensor, new_BCHW: Tensor, share: Tensor) -> Tensor:
        """Straight interpolation, with the length of each place's vector of channels between the two lengths: the mean of their powers
        `inpaint_detail_preservation`, which leans to the longer one."""
        share = share if share.ndim == 4 else share.unsqueeze(0)
        mixed_BCHW, share_B1HW = torch.lerp(original_BCHW, new_BCHW, share.to(new_BCHW)), share[:, :1].double()
        power = self.inpaint_detail_preservation
        old, new = (tensor.double().norm(dim=1, keepdim=True) ** power for tensor in (original_BCHW, new_BCHW))
        wanted = (old * (1 - share_B1HW) + new * share_B1HW) ** (1 / power)
        have = mixed_BCHW.double().norm(dim=1, keepdim=True).clamp(min=1e-5)
        return mixed_BCHW * (wanted / have).to(mixed_BCHW.dtype)

    def changed_places(self, original_CHW: Tensor, new_CHW: Tensor, nmask_HW: Tensor) -> np.ndarray:
        """(H, W), 0..1: 0 where the original is shown, 1 where the new picture is.

        d is the distance of the latents, spread to its neighborhood and rid of outliers. The original's share is s(1 / (1 + (d / t) ** contrast)),
        with s a smooth step and t the difference at which it is one half: the threshold, shifted towards the mask by its influence.
        """
        distance = (new_CHW - original_CHW).float().norm(dim=0).cpu().numpy()
        distance = mean_of_ranks(distance, 0.9, 1.0)
        distance = mean_of_ranks(distance, 0.25, 0.75)
        covered = 1.0 - nmask_HW.float().clamp(0, 1).cpu().numpy() ** (self.mask_blend_scale / 2)
        bias = _HALF * (1 - self.composite_mask_influence) + covered * self.composite_mask_influence
        half = np.maximum(self.composite_difference_threshold * bias / (1.00001 - bias), 1e-6)
        original = 1.0 / (1.0 + (distance / half) ** self.composite_difference_contrast)
        return 1.0 - smooth_step(original)


def smooth_step(x: np.ndarray) -> np.ndarray:
    """Perlin 2002: 6 x^5 - 15 x^4 + 10 x^3, for 0..1."""
    return x * x * x * (x * (x * 6 - 15) + 10)


def mean_of_ranks(values_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """For each place the mean of its neighbors between two quantiles of their weight, which falls with distance; 0.25 to 0.75 is near a median.

    The edges are repeated. Quantiles closer than the weight of one full neighbor are moved apart to that.
    """
    reach = _WINDOW_REACH
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (places[:, None] ** 2 + places[None, :] ** 2) / _WINDOW_SIGMA**2).ravel()
    padded = np.pad(values_HW, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2).reshape(*values_HW.shape, -1)
    order = windows.argsort(axis=-1)
    ranked, weight = np.take_along_axis(windows, order, axis=-1), weights[order]
    ends = weight.cumsum(axis=-1)
    total = float(weights.sum())
    first, last = low * total, high * total
    if last - first < 1.0:
        middle = min(max((first + last) / 2, _HALF), total - _HALF)
        first, last = middle - _HALF, middle + _HALF
    counted = np.clip(np.minimum(ends, last) - np.maximum(ends - weight, first), 0.0, None)
    mean: np.ndarray = (ranked * counted).sum(axis=-1) / counted.sum(axis=-1)
    return mean
