"""Tables of GGUF's IQ types: rows of 8 (or 4) weights that a code selects. They are read from the `gguf` package, which has them as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _grid(name: str) -> Tensor:
    from gguf import quants  # needed only by files with these types

    kind: Any = getattr(quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid.copy()).reshape(kind.grid_shape)


def iq1() -> Tensor:
    """(2048, 8) of -1, 0, 1."""
    return _grid("IQ1_S")


def iq2_xxs() -> Tensor:
    """(256, 8)."""
    return _grid("IQ2_XXS")


def iq2_xs() -> Tensor:
    """(512, 8)."""
    return _grid("IQ2_XS")


def iq2_s() -> Tensor:
    """(1024, 8)."""
    return _grid("IQ2_S")


def iq3_xxs() -> Tensor:
    """(256, 4)."""
    return _grid("IQ3_XXS")


def iq3_s() -> Tensor:
    """(512, 4)."""
    return _grid("IQ3_S")


def even_signs() -> Tensor:
    """(128, 8) of +1 and -1: the bits of a 7-bit index are seven signs, and the eighth makes the number of minus signs even."""
    indices = torch.arange(128)[:, None]
    bits = indices >> torch.arange(8) & 1
    bits[:, 7] = bits.sum(dim=1) % 2
    return (1 - 2 * bits).float()
