"""Qwen-Image's classifier-free guidance: what it combines keeps the length of the positive prompt's flow, token by token.

Shapes: B pictures, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from backend.families.qwenimage.identify import CELL


def keep_flow_length(x_BCHW: Tensor, cond_BCHW: Tensor, combined_BCHW: Tensor) -> Tensor:
    """The combined x0, moved so that the flow to it is as long in every token as the flow to the positive prompt's x0.

    The flow is (x - x0) / t; t cancels. As in the authors' pipeline: v * |v_cond| / |v|, over the numbers of a token.
    """
    wanted_BCHW, flow_BCHW = x_BCHW - cond_BCHW, x_BCHW - combined_BCHW
    ratio_B1HW = _token_lengths(wanted_BCHW) / _token_lengths(flow_BCHW).clamp(min=1e-12)
    return x_BCHW - flow_BCHW * ratio_B1HW


def _token_lengths(flow_BCHW: Tensor) -> Tensor:
    """The length of each token's numbers, (B, 1, H, W), the same for all latents of a token."""
    height, width = flow_BCHW.shape[2:]
    squares = flow_BCHW.square().sum(dim=1, keepdim=True)
    squares = functional.pad(squares, (0, width % CELL, 0, height % CELL))
    lengths = (functional.avg_pool2d(squares, CELL) * CELL**2).sqrt()
    return lengths.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)[:, :, :height, :width]
