"""Regions of a picture and the conditions that apply in them. Knows no page.

Each region's prompt is a branch of its own; the prediction is the mean of the branches, weighted in each place by the regions' masks (Bar-Tal et al.
2023, "MultiDiffusion", section 4.2). Branches are rows of the batch, so that a plan deals them to all slots.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNCOVERED = 1e-3
"""Weight of the first region where no other applies."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture in shares of its width and height, and how much its prompt counts there."""

    left: float
    right: float
    top: float
    bottom: float
    weight: float = 1.0

    def mask(self, height: int, width: int) -> Tensor:
        """(H, W): the weight inside, 0 outside; at least one place."""
        mask = torch.zeros(height, width)
        rows = slice(min(round(self.top * height), height - 1), max(round(self.bottom * height), round(self.top * height) + 1))
        columns = slice(min(round(self.left * width), width - 1), max(round(self.right * width), round(self.left * width) + 1))
        mask[rows, columns] = self.weight
        return mask


WHOLE = Region(0.0, 1.0, 0.0, 1.0)


def divide_evenly(count: int, *, across: bool) -> list[Region]:
    """As many parts of equal size, from left to right (`across`) or from top to bottom."""
    edges = [number / count for number in range(count + 1)]
    return [Region(first, last, 0.0, 1.0) if across else Region(0.0, 1.0, first, last) for first, last in itertools.pairwise(edges)]


def read_regions(text: str) -> list[Region]:
    """Regions from lines "left:right, top:bottom, weight", all shares from 0 to 1. Raises: ValueError that names the line.

    Example: "0:0.5, 0:1, 1.0" is the left half.
    """
    regions = []
    for number, line in enumerate((line for line in text.splitlines() if line.strip()), start=1):
        parts = [part.strip() for part in line.split(",")]
        try:
            (left, right), (top, bottom) = ((float(one) for one in part.split(":")) for part in parts[:2])
            region = Region(left, right, top, bottom, float(parts[2]) if len(parts) > 2 else 1.0)
        except (ValueError, IndexError) as error:
            raise ValueError(f'line {number} is {line[:80]!r}; write "left:right, top:bottom, weight"') from error
        if not (0 <= region.left < region.right <= 1 and 0 <= region.top < region.bottom <= 1 and 0 < region.weight <= 10):
            raise ValueError(f"line {number} is {line[:80]!r}; shares go from 0 to 1, left before right, top before bottom; weights up to 10")
        regions.append(region)
    return regions


class RegionalConditions:
    """A conditioning modifier: the parts of a composed prompt apply in their regions, in order."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def masks(self, height: int, width: int) -> Tensor:
        """(regions, H, W), with a little of the first where nothing else is."""
        key = (height, width)
        if key not in self._masks:
            masks = torch.stack([region.mask(height, width) for region in self._regions])
            masks[0] += UNCOVERED * (masks.sum(dim=0) == 0)
            self._masks[key] = masks
        return self._masks[key]

    def __call__(
        self, model: Any, x: Tensor, timestep: Tensor, uncond: Any, cond: list[dict[str, Any]], cond_scale: float, options: Any, seed: Any
    ) -> tuple[Any, ...]:
        """Changes nothing if the number of parts is another (a negative prompt alone, a script that composes prompts itself)."""
        if len(cond) == len(self._regions):
            masks = self.masks(x.shape[-2], x.shape[-1])
            cond = [{**one, "mask": masks[number : number + 1], "strength": 1.0 / len(cond)} for number, one in enumerate(cond)]
        return model, x, timestep, uncond, cond, cond_scale, options, seed
