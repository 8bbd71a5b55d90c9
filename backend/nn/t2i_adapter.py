"""T2I-Adapters as callables that return features: diffusers' module (Mou et al. 2023, "T2I-Adapter"), and where its features are added.

Must not know samplers, conditions, devices or files.

Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import T2IAdapter as LibraryAdapter
from torch import Tensor, nn


class AdapterNetwork(nn.Module):
    """A T2I-Adapter around diffusers' module. `hint_channels` is 1 for adapters that read gray hints."""

    def __init__(self, model: LibraryAdapter) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are stored and computed."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def hint_channels(self) -> int:
        return int(self.model.config.in_channels)

    @property
    def hint_step_px(self) -> int:
        """The hint's sides must be multiples of this."""
        return int(self.model.config.downscale_factor)

    @property
    def is_for_sdxl(self) -> bool:
        return str(self.model.config.adapter_type) == "full_adapter_xl"

    @property
    def widths(self) -> list[int]:
        """Channels of the features, outermost first."""
        return list(self.model.config.channels)

    def forward(self, hint: Tensor) -> list[Tensor]:
        """Features of a hint (B, C, height, width) in 0..1, outermost first. They do not depend on the step."""
        features: list[Tensor] = self.model(hint)
        return features


def place_features(features: Sequence[Tensor], config: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(residuals of the input blocks, of the middle) for a UNet of this config, in the order the UNet uses them: the last first.

    A level with attention adds its feature after its last transformer, a level without attention after its last layer (its downsampler, if it has
    one). A remaining feature goes to the middle.
    """
    left = list(features)
    inputs: list[Tensor | None] = [None]
    types = config.down_block_types
    for level, kind in enumerate(types):
        layers = config.layers_per_block if isinstance(config.layers_per_block, int) else config.layers_per_block[level]
        blocks: list[Tensor | None] = [None for _ in range(layers + (level < len(types) - 1))]
        if left:
            blocks[layers - 1 if "CrossAttn" in kind else -1] = left.pop(0)
        inputs += blocks
    return inputs[::-1], [left.pop(0)] if left else []
