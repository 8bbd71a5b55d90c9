"""Z-Image's network: diffusers' ZImageTransformer2DModel with its learned tokens of padding in a module of their own, which can be placed.

It is run by its program (backend/families/zimage/program.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ZImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn


class PaddingTokens(nn.Module):
    """The tokens (1, D) that fill up picture and text."""

    def __init__(self, picture: nn.Parameter, text: nn.Parameter) -> None:
        super().__init__()
        self.picture, self.text = picture, text


class ZImageTransformer(ZImageTransformer2DModel):  # type: ignore[misc]  # the library's class is untyped
    """`pads` has the weights that files call x_pad_token and cap_pad_token."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        cap_feat_dim: int = 2560,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: Sequence[int] = (32, 48, 48),
    ) -> None:
        super().__init__(
            in_channels=in_channels, dim=dim, n_layers=n_layers, n_refiner_layers=n_refiner_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
            norm_eps=norm_eps, cap_feat_dim=cap_feat_dim, rope_theta=rope_theta, t_scale=t_scale, axes_dims=list(axes_dims),
        )  # fmt: skip
        pads = PaddingTokens(self.x_pad_token, self.cap_pad_token)
        del self.x_pad_token, self.cap_pad_token
        self.pads = pads
