"""What ControlNets of transformers share: a callable around the library's module, and residuals as pictures of tokens. Knows no family.

Shapes: B rows, C channels, H W latent rows and columns, L tokens of the picture, D token width, h w rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TransformerControlNetwork(nn.Module):
    """A ControlNet around the library's `model`, with the calls of `ControlNetwork`: `embed_hint`, and `forward`, which returns residuals."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def config(self) -> Any:
        """The library's configuration of the network."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are stored and computed."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def reads_pixels(self) -> bool:
        """Whether the hint is a picture in 0..1; otherwise it is the picture's latents as the denoiser sees them, plus `latent_offset`."""
        return False

    @property
    def latent_offset(self) -> float:
        return 0.0

    @property
    def hole_value(self) -> float | None:
        """The level, 0..1, of what is to be filled in a hint for inpainting; None for a network that does no inpainting."""
        return None

    @property
    def needs_hole(self) -> bool:
        """Whether it does nothing but inpainting."""
        return self.hole_value is not None

    def join_hint(self, latents: Tensor, given_B1HW: Tensor | None) -> Tensor:
        """The hint as `embed_hint` reads it. `given_B1HW`: 1 where the picture is given, 0 where it is to be filled; None for a whole picture."""
        return latents if given_B1HW is None else torch.cat([latents, given_B1HW], dim=1)

    @property
    def num_types(self) -> int:
        """How many kinds of hints a Union is told apart; 0 for other ControlNets."""
        return 0

    @property
    def residual_width(self) -> int:
        """Numbers of all residuals, per token of the picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say how large its residuals are.")

    def make_empty(self) -> TransformerControlNetwork:
        """A new network of the same kind with the same names and types, whose weights are yet to be filled."""
        raise NotImplementedError(f"{type(self).__name__} does not implement make_empty().")


def as_picture(tokens_BLD: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens as (B, D, h, w), so that masks fit them."""
    return tokens_BLD.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return, no-untyped-call]


def as_tokens(residual: Tensor) -> Tensor:
    """A residual (B, D, h, w) as tokens (B, L, D). Tokens stay as they are."""
    return residual.flatten(2).transpose(1, 2) if residual.ndim == 4 else residual


def spread_evenly(residuals: Sequence[Tensor | None], num_blocks: int) -> list[Tensor | None]:
    """One entry per block of the denoiser, each residual for an equal share of blocks (diffusers' rule for SD3). 2 for 3 blocks: 0 0 1."""
    share = num_blocks / len(residuals) if residuals else 1.0
    return [residuals[int(block / share)] for block in range(num_blocks)] if residuals else []
