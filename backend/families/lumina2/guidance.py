"""Lumina2's classifier-free guidance: what it combines keeps the length of the positive prompt's flow.

Shapes: B pictures, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_row_lengths(x_BCHW: Tensor, cond_BCHW: Tensor, combined_BCHW: Tensor) -> Tensor:
    """The combined x0, moved so that the flow to it is as long in every row of every channel as the flow to the positive prompt's x0.

    The flow is (x - x0) / t; t cancels. As in the authors' pipeline: v * |v_cond| / |v|, over the last dim of the latents.
    """
    wanted_BCHW, flow_BCHW = x_BCHW - cond_BCHW, x_BCHW - combined_BCHW
    wanted_BCH1, lengths_BCH1 = (torch.linalg.vector_norm(flow, dim=-1, keepdim=True) for flow in (wanted_BCHW, flow_BCHW))
    moved_BCHW: Tensor = x_BCHW - flow_BCHW * wanted_BCH1 / lengths_BCH1.clamp(min=1e-12)
    return moved_BCHW
