"""Large pictures as overlapping views that the network sees one by one and whose answers are averaged in each step. Knows no page.

Sources: Bar-Tal et al., "MultiDiffusion" (2023), equation 5: the plain mean where views overlap. Jimenez, "Mixture of Diffusers" (2023), section 3:
weights of a Gaussian around each view's center.

Views of a step go into the network as rows, so that a plan deals them to all slots. Rows are ordered by branch, then view, then picture, as
the rest of the program orders them.

Shapes: R rows = K branches x P pictures, V views, C channels, H W latent rows and columns, h w those of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN, GAUSSIAN = "MultiDiffusion", "Mixture of Diffusers"
GAUSSIAN_VARIANCE = 0.01
"""Of the weights of Mixture of Diffusers, in squares of the view's side."""


@dataclass(frozen=True, slots=True)
class View:
    """A part of the latents: rows from `top`, columns from `left`, `height` by `width`."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, x: Tensor) -> Tensor:
        """This part of a tensor (..., H, W)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def cut_scaled(self, x: Tensor, height: int, width: int) -> Tensor:
        """This part of a tensor (..., h, w) that covers latents of `height` by `width` in fewer places; from the next place up and left."""
        down, across = height / x.shape[-2], width / x.shape[-1]
        top, left = int(self.top / down), int(self.left / across)
        return x[..., top : top + math.ceil(self.height / down), left : left + math.ceil(self.width / across)]


def list_starts(length: int, side: int, overlap: int) -> list[int]:
    """First places of as few parts of `side` as cover `length` with at least `overlap`, evenly spread. Example: 10, 4, 1 -> 0, 3, 6."""
    if side >= length:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def list_views(height: int, width: int, view_height: int, view_width: int, overlap: int) -> list[View]:
    """Views of latents, row by row. The overlap is at most half of a view's shorter side."""
    view_height, view_width = min(view_height, height), min(view_width, width)
    overlap = min(overlap, min(view_height, view_width) // 2)
    return [
        View(top, left, view_height, view_width)
        for top in list_starts(height, view_height, overlap)
        for left in list_starts(width, view_width, overlap)
    ]


def weigh_view(view: View, method: str, like: Tensor) -> Tensor:
    """(h, w): ones, or a Gaussian around the center. Never zero, so that a place that one view covers keeps its value."""
    if method == PLAIN:
        return torch.ones(view.height, view.width, device=like.device, dtype=like.dtype)
    along = []
    for side in (view.height, view.width):
        away = (torch.arange(side, device=like.device, dtype=torch.float32) - (side - 1) / 2) / side
        along.append(torch.exp(-(away**2) / (2 * GAUSSIAN_VARIANCE)))
    return (along[0][:, None] * along[1][None, :]).clamp(min=1e-30)


class ViewedNetwork:
    """A wrapper of the UNet function: runs `views_at_once` views on every one of `num_slots` slots in one call, and averages."""

    def __init__(self, method: str, view_size: tuple[int, int], overlap: int, views_at_once: int, num_slots: int = 1) -> None:
        self._method, self._size, self._overlap, self._at_once = method, view_size, overlap, views_at_once * num_slots

    def parts_of(self, height: int, width: int) -> tuple[int, int, int]:
        """For the planner: how many views of each picture a call takes, and their rows and columns."""
        views = list_views(height, width, *self._size, self._overlap)
        return min(len(views), self._at_once), views[0].height, views[0].width

    def __call__(self, apply_model: Callable[..., Tensor], args: Mapping[str, Any]) -> Tensor:
        x_RCHW, sigma_R, given, kinds = args["input"], args["timestep"], args["c"], args["cond_or_uncond"]
        views = list_views(*x_RCHW.shape[2:], *self._size, self._overlap)
        if len(views) == 1:
            return apply_model(x_RCHW, sigma_R, **given)
        total_RCHW, weight_HW = torch.zeros_like(x_RCHW), torch.zeros_like(x_RCHW[0, 0])
        for first in range(0, len(views), self._at_once):
            group = views[first : first + self._at_once]
            rows = _Rows(group, len(kinds), x_RCHW)
            output = apply_model(rows.cut(x_RCHW), rows.repeat(sigma_R), **rows.arguments(given))
            for view, answer_RChw in zip(group, rows.split(output)):
                weight_hw = weigh_view(view, self._method, x_RCHW)
                view.cut(total_RCHW).add_(answer_RChw.to(total_RCHW) * weight_hw)
                view.cut(weight_HW).add_(weight_hw)
        return total_RCHW / weight_HW


class _Rows:
    """The rows of some views: K branches x V views x P pictures, made from K x P rows."""

    def __init__(self, views: Sequence[View], num_branches: int, x_RCHW: Tensor) -> None:
        self._views, self._branches = views, num_branches
        self._rows, _, self._height, self._width = x_RCHW.shape
        self._pictures = self._rows // num_branches

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (self._branches, self._pictures)) for part in parts], dim=1).flatten(0, 2)

    def cut(self, tensor: Tensor) -> Tensor:
        """(R, C, H, W) to the views' rows (K V P, C, h, w)."""
        return self._join([view.cut(tensor) for view in self._views])

    def repeat(self, tensor: Tensor) -> Tensor:
        """(R, ...) to (K V P, ...), the same for each view."""
        return self._join([tensor] * len(self._views))

    def split(self, output: Tensor) -> list[Tensor]:
        """(K V P, ...) to a tensor (R, ...) for each view."""
        return [part.flatten(0, 1) for part in output.unflatten(0, (self._branches, len(self._views), self._pictures)).unbind(dim=1)]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The network's other arguments for the views' rows."""
        changed = dict(given)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self._rows:
                changed[name] = self.cut(value) if value.shape[-2:] == (self._height, self._width) and value.ndim == 4 else self.repeat(value)
        if isinstance(given.get("control"), Mapping):
            changed["control"] = {kind: [self._cut_residual(one) for one in many] for kind, many in given["control"].items()}
        changed["transformer_options"] = self._options(given.get("transformer_options") or {})
        return changed

    def _cut_residual(self, residual: Tensor | None) -> Tensor | None:
        if residual is None:
            return None
        parts = [view.cut_scaled(residual, self._height, self._width) for view in self._views]
        return self._join(parts) if residual.shape[0] == self._rows else torch.cat(parts)

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        kinds = options.get("cond_or_uncond", [])
        row_kinds = [kind for kind in kinds for _ in range(len(self._views) * self._pictures)]
        described = {
            **options,
            "cond_indices": [row for row, kind in enumerate(row_kinds) if kind == 0],
            "uncond_indices": [row for row, kind in enumerate(row_kinds) if kind == 1],
            "picture_indices": [*range(len(self._views) * self._pictures)] * len(kinds),
        }
        if isinstance(options.get("cond_mark"), Tensor):
            described["cond_mark"] = self.repeat(options["cond_mark"])
        return described
