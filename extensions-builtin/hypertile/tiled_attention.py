"""HyperTile: self-attention within tiles of the picture instead of over all of it. Knows no page.

Source: tfernd, "HyperTile" (2023): the tokens of a block are cut into tiles whose number of rows and columns is chosen among the smallest divisors
of the block's that are large enough, chosen again in each step, so that no seam stays in place.

Shapes: B rows, L tokens = h w, T tiles of l tokens, D width of a token.
"""

from __future__ import annotations

import math
import random
from typing import Any

from torch import Tensor

_FACT = "hypertile"
PX_PER_LATENT = 8


def list_tile_sides(side: int, least: int, count: int) -> list[int]:
    """The `count` smallest divisors of `side` that are at least `least`; `side` itself if none is smaller."""
    least = min(least, side)
    return [number for number in range(least, side + 1) if side % number == 0][: max(1, count)]


def find_grid(latent_height: int, latent_width: int, num_tokens: int) -> tuple[int, int, int] | None:
    """(halvings, rows, columns) of a block with that many tokens; None if no halving of the latents has as many."""
    height, width, depth = latent_height, latent_width, 0
    while height * width > num_tokens:
        height, width, depth = math.ceil(height / 2), math.ceil(width / 2), depth + 1
    return (depth, height, width) if height * width == num_tokens else None


def to_tiles(tokens_BLD: Tensor, height: int, width: int, tile: tuple[int, int]) -> Tensor:
    """(B, h w, D) to (B T, l, D), tiles of `tile` rows and columns."""
    rows, columns = tile
    split = tokens_BLD.view(tokens_BLD.shape[0], height // rows, rows, width // columns, columns, -1)
    return split.transpose(2, 3).reshape(-1, rows * columns, tokens_BLD.shape[-1])


def from_tiles(tiles: Tensor, height: int, width: int, tile: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`."""
    rows, columns = tile
    split = tiles.view(-1, height // rows, width // columns, rows, columns, tiles.shape[-1])
    return split.transpose(2, 3).reshape(-1, height * width, tiles.shape[-1])


class HyperTile:
    """The two hooks around self-attention. `max_depth`: halvings down to which blocks are tiled. Choices depend on seed, noise level and size
    alone, so that all slots make the same ones."""

    def __init__(self, *, seed: int, tile_px: int, max_depth: int, swap_size: int) -> None:
        self._seed, self._least, self._max_depth, self._swap_size = seed, max(1, tile_px // PX_PER_LATENT), max_depth, swap_size

    def add_to(self, unet: Any) -> None:
        """Set the hooks of a patcher."""
        unet.set_model_attn1_patch(self._cut)
        unet.set_model_attn1_output_patch(self._join)

    def _cut(self, normed_BLD: Tensor, context_BLD: Tensor, value_BLD: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        grid = find_grid(*extra["original_shape"][-2:], normed_BLD.shape[1])
        if grid is None or grid[0] > self._max_depth or context_BLD.shape[1] != normed_BLD.shape[1]:
            return normed_BLD, context_BLD, value_BLD
        _, height, width = grid
        draw = random.Random(f"{self._seed} {float(extra['sigmas'][0])} {extra['block']} {height}x{width}")
        tile = tuple(draw.choice(list_tile_sides(side, self._least, self._swap_size)) for side in (height, width))
        extra[_FACT] = height, width, tile
        normed, context, value = (to_tiles(tensor, height, width, (tile[0], tile[1])) for tensor in (normed_BLD, context_BLD, value_BLD))
        return normed, context, value

    def _join(self, output: Tensor, extra: dict[str, Any]) -> Tensor:
        """`extra` is one block's, the same in both hooks."""
        found = extra.pop(_FACT, None)
        return output if found is None else from_tiles(output, *found)
