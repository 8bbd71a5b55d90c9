"""Side branches: low-rank changes of a layer's weight added to its output, so that the weight itself is neither read nor written.

y = W x + up (down x) is (W + up down) x; all changes of a layer are stacked along the rank, with their strengths in `up`. A rank of 16 to 64 adds
a few percent of the layer's work.

Shapes: O outputs, I inputs, R rank, B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """A change up (O, R, ...) @ down (R, I, ...) * scale of a weight (O, I, ...)."""

    up: Tensor
    down: Tensor
    scale: float


def can_have_branch(layer: nn.Module) -> bool:
    """Whether the layer is a matrix product or a plain convolution."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros")


class SideBranch:
    """The hook of one layer. Its matrices are made for the device and dtype where they were last used."""

    def __init__(self, changes: Sequence[LowRank]) -> None:
        self._changes = tuple(change for change in changes if change.scale != 0.0)
        self._stacked: tuple[Tensor, Tensor] | None = None

    def add(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._changes:
            return output
        x = args[0]
        stacked = self._stacked
        if stacked is None or stacked[0].device != x.device or stacked[0].dtype != x.dtype:
            stacked = self._stacked = self._stack(layer, x)
        down, up = stacked
        if not isinstance(layer, nn.Conv2d):
            return output + nn.functional.linear(nn.functional.linear(x, down), up)
        inner = nn.functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return output + nn.functional.conv2d(inner, up)

    def _stack(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """down (R, I, ...) and up (O, R, ...), in x's dtype on its device."""
        ups = [change.up.to(x.device, torch.float32).flatten(1) * change.scale for change in self._changes]
        downs = [change.down.to(x.device, torch.float32) for change in self._changes]
        up, down = torch.cat(ups, dim=1), torch.cat([one.reshape(one.shape[0], -1) for one in downs])
        if isinstance(layer, nn.Conv2d):
            up, down = up[:, :, None, None], down.reshape(-1, layer.in_channels, *layer.kernel_size)
        return down.to(x.dtype), up.to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> SideBranch:
        copied = memo[id(self)] = SideBranch(self._changes)
        return copied
