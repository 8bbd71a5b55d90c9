"""Resizing of tensors under the names that extensions import: `adaptive_resize`, `bislerp`, `lanczos`.

Shapes: B rows, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_STRAIGHT = 1e-5
"""How near to 1 a cosine is if its directions are interpolated straight."""


def adaptive_resize(samples: Tensor, width: int, height: int, upscale_method: str, crop: str) -> Tensor:
    """`samples` (B, C, H, W) at another size. `crop` "center" first cuts them to the new ratio of sides, anything else stretches.

    Methods: bislerp, lanczos, and those of torch's `interpolate`. Sides are at least 1.
    """
    width, height = max(1, width), max(1, height)
    if crop == "center":
        samples = _cut_to_ratio(samples, width / height)
    if upscale_method == "bislerp":
        return bislerp(samples, width, height)
    if upscale_method == "lanczos":
        return lanczos(samples, width, height)
    kinds: dict[str, Any] = {"align_corners": False} if upscale_method in ("bicubic", "bilinear") else {}
    return functional.interpolate(samples, (height, width), mode=upscale_method, **kinds)


def _cut_to_ratio(samples: Tensor, ratio: float) -> Tensor:
    """The middle of `samples` with width / height = `ratio`."""
    height, width = samples.shape[2:]
    kept_width, kept_height = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return samples[:, :, top : top + kept_height, left : left + kept_width]


def lanczos(samples: Tensor, width: int, height: int) -> Tensor:
    """Pillow's Lanczos filter, channel by channel in floats."""
    import numpy as np  # only here
    from PIL import Image

    planes = samples.float().cpu().flatten(0, 1).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).view(*samples.shape[:2], height, width).to(samples)


def bislerp(samples: Tensor, width: int, height: int) -> Tensor:
    """Columns, then rows; between two places their vectors of channels are turned into each other, and their lengths interpolated."""
    wide = _slerp_along(samples.float(), width, dim=3)
    return _slerp_along(wide, height, dim=2).to(samples.dtype)


def _slerp_along(samples: Tensor, count: int, dim: int) -> Tensor:
    have = samples.shape[dim]
    places = ((torch.arange(count, device=samples.device) + 0.5) * have / count - 0.5).clamp(0, have - 1)
    first = places.floor().long()
    share = (places - first).view([-1 if axis == dim else 1 for axis in range(4)])
    return _slerp(samples.index_select(dim, first), samples.index_select(dim, (first + 1).clamp(max=have - 1)), share)


def _slerp(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Shoemake 1985; straight interpolation where the directions hardly differ or are opposite."""
    lengths = [tensor.norm(dim=1, keepdim=True) for tensor in (one, other)]
    from_here, to_there = (tensor / length.clamp(min=1e-12) for tensor, length in zip((one, other), lengths))
    cosine = (from_here * to_there).sum(dim=1, keepdim=True).clamp(-1, 1)
    angle, straight = torch.acos(cosine), cosine.abs() > 1 - _STRAIGHT
    sine = torch.where(straight, torch.ones_like(angle), torch.sin(angle))
    turned = (torch.sin((1 - share) * angle) * from_here + torch.sin(share * angle) * to_there) / sine
    return torch.where(straight, torch.lerp(one, other, share), turned * torch.lerp(lengths[0], lengths[1], share))
