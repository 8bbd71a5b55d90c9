"""FreeU's arithmetic: strengthens the backbone of a UNet's decoder and weakens the low frequencies of its skips. Knows no page.

Source: Si et al., "FreeU: Free Lunch in Diffusion U-Net" (CVPR 2024), equations 4 to 6.
Shapes: B rows, C channels, H W rows and columns of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules_forge.unet_patching import StepWindow

Factors = Mapping[int, tuple[float, float]]
"""Channels of the backbone -> (factor of the backbone, factor of the skip's low frequencies)."""


def scale_backbone(hidden_BCHW: Tensor, factor: float) -> Tensor:
    """The first half of the channels times 1 + (factor - 1) m, where m is the mean over channels brought to 0..1 (equations 4 and 5)."""
    mean_B1HW = hidden_BCHW.mean(dim=1, keepdim=True)
    low, high = mean_B1HW.amin(dim=(2, 3), keepdim=True), mean_B1HW.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    structure_B1HW = (mean_B1HW - low) / torch.where(spread > 0, spread, torch.ones_like(spread))
    first_BCHW, rest_BCHW = hidden_BCHW.tensor_split(2, dim=1)
    return torch.cat([first_BCHW * (1 + (factor - 1) * structure_B1HW), rest_BCHW], dim=1)


def scale_low_frequencies(skip_BCHW: Tensor, factor: float) -> Tensor:
    """The skip with its frequencies -1 and 0, in both directions, times `factor` (equation 6 with a radius of 1)."""
    spectrum = torch.fft.fft2(skip_BCHW.float())
    for row in (-1, 0):
        for column in (-1, 0):
            spectrum[..., row, column] *= factor
    return torch.fft.ifft2(spectrum).real.to(skip_BCHW.dtype)


def patch_freeu(unet: Any, factors: Factors, window: StepWindow) -> Any:
    """A clone of the patcher with FreeU in the output blocks whose backbone has the given numbers of channels."""

    def shape_output_block(hidden_BCHW: Tensor, skip_BCHW: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found = factors.get(hidden_BCHW.shape[1])
        if found is None or not window.is_open:
            return hidden_BCHW, skip_BCHW
        return scale_backbone(hidden_BCHW, found[0]), scale_low_frequencies(skip_BCHW, found[1])

    clone = unet.clone()
    clone.set_model_output_block_patch(shape_output_block)
    window.watch(clone)
    return clone
