"""The extra input channels of inpainting models, made from mask and masked picture.

Shapes: B pictures, C latent channels, H W rows and columns (of pixels for a mask, else of latents).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mask_before_picture(mask_B1HW: Tensor, masked_BCHW: Tensor) -> Tensor:
    """The mask in latent size, then the masked picture's latents, (B, 1 + C, H, W): Stable Diffusion's order."""
    small = functional.interpolate(mask_B1HW, size=masked_BCHW.shape[-2:]).to(masked_BCHW)
    return torch.cat([small.expand(masked_BCHW.shape[0], -1, -1, -1), masked_BCHW], dim=1)


def mask_behind_picture(mask_B1HW: Tensor, masked_BCHW: Tensor, *, factor: int) -> Tensor:
    """The masked picture's latents, then all mask pixels, `factor` x `factor` per latent, (B, C + factor^2, H, W): Flux Fill's order."""
    height, width = masked_BCHW.shape[-2] * factor, masked_BCHW.shape[-1] * factor
    if mask_B1HW.shape[-2:] != (height, width):
        mask_B1HW = functional.interpolate(mask_B1HW, size=(height, width))
    pixels = functional.pixel_unshuffle(mask_B1HW, factor).to(masked_BCHW)
    return torch.cat([masked_BCHW, pixels.expand(masked_BCHW.shape[0], -1, -1, -1)], dim=1)
