"""Branches of a step: which conditions run, with which weights, which of them share a network call, and how their outputs are averaged.

None of this depends on the noise level, so a run prepares it once (`StepMemory`) unless a hook may change it between steps. Must not know prompts,
samplers, options or the formula of guidance.

Shapes: B batch, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backend.sampling.condition import Area, CompiledCondition, Condition

COND, UNCOND = 0, 1
FEATHER_ROWS = 8
Place = tuple[slice, slice, slice, slice]


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One condition to run. `weight` is a number, (B, 1, 1, 1) or has the area's shape. `area` None means the whole picture.

    `shape` is that of the part of the latents that runs.
    """

    kind: int
    shape: torch.Size
    weight: float | Tensor
    conditions: dict[str, Condition]
    area: Area | None
    control: Any

    def fits(self, other: Branch) -> bool:
        """Whether both can run in one network call."""
        return (
            self.shape == other.shape
            and self.control is other.control
            and self.conditions.keys() == other.conditions.keys()
            and all(condition.can_concat(other.conditions[name]) for name, condition in self.conditions.items())
        )

    def part_of(self, x_BCHW: Tensor) -> Tensor:
        """The part of the latents that the condition applies to."""
        return x_BCHW if self.area is None else x_BCHW[slices_of(self.area)]


@dataclass(slots=True, eq=False)
class CallPlan:
    """Branches that run in one network call, and what the call gets besides latents and noise levels.

    `arguments` are the network's conditions; `described` the part of the transformer options that says what the rows are. Both are read only:
    a call gets copies of the dictionaries.
    """

    branches: Sequence[Branch]
    kinds: list[int]
    arguments: dict[str, Any]
    described: dict[str, Any]
    repeats_whole: bool
    is_plain: bool
    """One branch of a kind, each the whole picture with weight 1: their outputs are the means."""


@dataclass(slots=True)
class StepMemory:
    """What the last step of a sampler loop prepared, by name, and from what. One memory serves one loop on one thread.

    Example: `find("calls", (cond, uncond), (x.shape,), make)` calls `make` in the first step, and again once a prompt's schedule brings others.
    """

    _found: dict[str, tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...], Any]] = field(default_factory=dict)

    def find(self, name: str, inputs: tuple[Any, ...], facts: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returned for these very `inputs` (compared by identity, and kept alive) and equal `facts`."""
        ids, known = tuple(map(id, inputs)), self._found.get(name)
        if known is None or known[0] != ids or known[2] != facts:
            known = self._found[name] = (ids, inputs, facts, make())
        return known[3]


def slices_of(area: Area) -> Place:
    return slice(None), slice(None), slice(area[2], area[2] + area[0]), slice(area[3], area[3] + area[1])


def make_branch(kind: int, compiled: CompiledCondition, x_BCHW: Tensor, sigma_B: Tensor) -> Branch | None:
    """The branch for a condition; None if the condition does not apply at this noise level."""
    sigma = float(sigma_B[0]) if "timestep_start" in compiled or "timestep_end" in compiled else 0.0
    if sigma > compiled.get("timestep_start", math.inf) or sigma < compiled.get("timestep_end", 0.0):
        return None
    area: Area | None = compiled.get("area")
    part_BCHW = x_BCHW if area is None else x_BCHW[slices_of(area)]
    size_area = area or (x_BCHW.shape[2], x_BCHW.shape[3], 0, 0)
    conditions = {
        name: condition.process_cond(batch_size=x_BCHW.shape[0], device=x_BCHW.device, area=size_area)
        for name, condition in compiled["model_conds"].items()
    }
    return Branch(kind, part_BCHW.shape, _weigh(compiled, x_BCHW, part_BCHW), conditions, area, compiled.get("control"))


def like_latents(strengths_B111: Tensor, x_BCHW: Tensor) -> Tensor:
    """Strengths on the device and in the type of the latents, by kernels: a copy from main memory would make the host wait."""
    if strengths_B111.device.type != "cpu":
        return strengths_B111.to(x_BCHW)
    return torch.cat([x_BCHW.new_full((1, 1, 1, 1), strength) for strength in strengths_B111.flatten().tolist()])


def _weigh(compiled: CompiledCondition, x_BCHW: Tensor, part_BCHW: Tensor) -> float | Tensor:
    """The condition's strength, times its mask or, without one, times a ramp at the area's edges inside the picture."""
    strength, area = compiled.get("strength", 1.0), compiled.get("area")
    strength = like_latents(strength, x_BCHW) if isinstance(strength, Tensor) else float(strength)
    mask_BHW: Tensor | None = compiled.get("mask")
    if mask_BHW is not None:
        if mask_BHW.shape[1:] != x_BCHW.shape[2:]:
            raise ValueError(
                f"A condition's mask has {tuple(mask_BHW.shape[1:])} rows and columns, the latents {tuple(x_BCHW.shape[2:])}. Resize the mask."
            )
        rows = slice(None) if area is None else slice(area[2], area[2] + area[0])
        columns = slice(None) if area is None else slice(area[3], area[3] + area[1])
        cut = mask_BHW[:, rows, columns].to(x_BCHW).unsqueeze(1) * compiled.get("mask_strength", 1.0)
        weighted: Tensor = cut * strength
        return weighted
    return strength if area is None else _feather(area, x_BCHW, part_BCHW) * strength


def _feather(area: Area, x_BCHW: Tensor, part_BCHW: Tensor) -> Tensor:
    """Ones, with ramps at the edges that are not on the picture's edge."""
    ramps = []
    for dim in (0, 1):
        length, start, whole = area[dim], area[2 + dim], x_BCHW.shape[2 + dim]
        places = torch.arange(length, device=x_BCHW.device, dtype=x_BCHW.dtype)
        from_start = (places + 1) / FEATHER_ROWS if start > 0 else torch.ones_like(places)
        from_end = (length - places) / FEATHER_ROWS if start + length < whole else torch.ones_like(places)
        ramps.append(torch.minimum(from_start, from_end).clamp(max=1.0))
    return (ramps[0].view(-1, 1) * ramps[1]).expand(part_BCHW.shape)


def plan_call(branches: Sequence[Branch], sigma_B: Tensor) -> CallPlan:
    """The call that runs these branches together."""
    kinds = [branch.kind for branch in branches]
    first, others = branches[0], branches[1:]
    arguments = {name: condition.concat([branch.conditions[name] for branch in others]) for name, condition in first.conditions.items()}
    repeats_whole = all(branch.area is None for branch in branches)
    weights_are_one = all(isinstance(branch.weight, float) and branch.weight == 1.0 for branch in branches)
    is_plain = repeats_whole and weights_are_one and len(set(kinds)) == len(kinds)
    return CallPlan(branches, kinds, arguments, _describe_rows(kinds, sigma_B), repeats_whole, is_plain)


def _describe_rows(kinds: list[int], sigma_B: Tensor) -> dict[str, Any]:
    """Transformer options describing the rows: `cond_or_uncond` per branch, the rest per row. `picture_indices` are positions in the batch."""
    batch_size = sigma_B.shape[0]
    row_kinds = [kind for kind in kinds for _ in range(batch_size)]
    return {
        "cond_or_uncond": kinds,
        "cond_mark": torch.cat([torch.full_like(sigma_B, kind) for kind in kinds]),
        "cond_indices": [row for row, kind in enumerate(row_kinds) if kind == COND],
        "uncond_indices": [row for row, kind in enumerate(row_kinds) if kind == UNCOND],
        "picture_indices": [*range(batch_size)] * len(kinds),
    }


class Mean:
    """Weighted mean of the outputs of all conditions of one kind (COND or UNCOND)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight: float | Tensor = 0.0

    def add(self, branch: Branch, output_BCHW: Tensor, like_BCHW: Tensor) -> None:
        if branch.area is None:
            weighted = output_BCHW if isinstance(branch.weight, float) and branch.weight == 1.0 else output_BCHW * branch.weight
            self._sum, self._weight = weighted if self._sum is None else self._sum + weighted, self._weight + branch.weight
            return
        total = torch.zeros_like(like_BCHW) if self._sum is None else self._sum.clone()
        weight = self._weight * torch.ones_like(like_BCHW)
        place = slices_of(branch.area)
        total[place] += output_BCHW * branch.weight
        weight[place] += branch.weight
        self._sum, self._weight = total, weight

    def result(self, like_BCHW: Tensor) -> Tensor:
        """The mean; zeros if nothing was added, and where no condition applies."""
        if self._sum is None:
            return torch.zeros_like(like_BCHW)
        if isinstance(self._weight, float):
            return self._sum if self._weight in (0.0, 1.0) else self._sum / self._weight
        return torch.where(self._weight == 0, self._sum, self._sum / torch.where(self._weight == 0, 1.0, self._weight))
