"""Reference pictures: latents whose tokens a network reads along with those of the picture it makes (Kontext). Knows no family and no files.

Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

REFERENCES = ("reference_1", "reference_2", "reference_3", "reference_4")
"""Names of a network's inputs, (B or 1, C, H, W) each, of any size. A network that takes references reads all of them."""


def shape_of_cost(shape: Sequence[int], references: Sequence[Tensor]) -> tuple[int, ...]:
    """The shape (B, C, H, W) of latents without references that would cost about as much: as many tokens, in more rows.

    Example: 64x64 latents with one reference of 64x32 -> 96 rows of 64.
    """
    batch, channels, height, width = shape
    more = sum(one.shape[-2] * one.shape[-1] for one in references)
    return batch, channels, height + -(-more // max(1, width)), width
