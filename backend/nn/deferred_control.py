"""ControlNet residuals that are yet to be computed: for which rows, with which networks, and how they add up. Knows no slots and no plan.

Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from backend.nn.tiles import Swaps, Tile

Residuals = dict[str, list[Tensor | None]]
"""Residuals by kind of place in the network (`Addition.kind`). The last of each list is used first."""
Send = Callable[[Tensor, torch.device], Tensor]


class ControlTask(Protocol):
    """Residuals of one ControlNet for some rows of a call."""

    @property
    def kinds(self) -> frozenset[str]:
        """The lists that it fills. The runner of a call waits for the task where the first entry of one of them is added."""
        ...

    @property
    def network(self) -> nn.Module:
        """The ControlNet's own network. A task may run with a copy of it."""
        ...

    @property
    def home(self) -> torch.device:
        """The device of `network`."""
        ...

    def rows(self, first: int, end: int) -> ControlTask:
        """The task for rows [`first`, `end`) only."""
        ...

    def on(self, device: torch.device, send: Send) -> ControlTask:
        """The task with its inputs sent to `device`."""
        ...

    def run(self, network: nn.Module) -> Residuals:
        """Residuals (B, C, H, W), computed on the inputs' device with `network`, which must be there too."""
        ...

    @property
    def has_tiles(self) -> bool:
        """Whether tiles of a row can compute their own parts of the residuals."""
        ...

    def run_on_tile(self, network: nn.Module, tile: Tile) -> Swaps[Residuals]:
        """A tile's rows of what `run` gives; only if `has_tiles`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DeferredControl:
    """What a chain of ControlNets adds to a call, oldest link first: residuals that already exist, and tasks."""

    parts: tuple[Residuals | ControlTask, ...]

    def rows(self, first: int, end: int, num_rows: int) -> DeferredControl:
        """The same for rows [`first`, `end`) of `num_rows`."""
        return DeferredControl(
            tuple(part.rows(first, end) if not isinstance(part, dict) else residual_rows(part, first, end, num_rows) for part in self.parts)
        )

    def compute(self, device: torch.device) -> Residuals:
        """Compute the chain's residuals in the calling thread, with the ControlNets' own networks on their devices. Returns them on `device`."""
        total: Residuals = {}
        for part in self.parts:
            total = add_residuals(part if isinstance(part, dict) else _run_at_home(part, device), total)
        return total


@torch.no_grad()
def _run_at_home(task: ControlTask, device: torch.device) -> Residuals:
    residuals = task.on(task.home, _send).run(task.network)
    return {kind: [None if one is None else one.to(device) for one in found] for kind, found in residuals.items()}


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def residual_rows(control: Mapping[str, Sequence[Tensor | None]], first: int, end: int, num_rows: int) -> Residuals:
    """The residuals for these rows. A residual with a single row applies to all."""
    return {
        kind: [one if one is None or one.shape[0] != num_rows else one[first:end] for one in residuals]
        for kind, residuals in control.items()
        if isinstance(residuals, (list, tuple))
    }


def add_residuals(own: Residuals, before: Mapping[str, Sequence[Tensor | None]]) -> Residuals:
    """Add `before` to `own`, which is modified. Lists are filled from the front, so equal indexes mean equal places."""
    for kind, residuals in before.items():
        mine = own.setdefault(kind, [])
        mine += [None] * (len(residuals) - len(mine))
        for index, residual in enumerate(residuals):
            if residual is not None:
                mine[index] = add_residual(mine[index], residual)
    return own


def add_residual(own: Tensor | None, before: Tensor) -> Tensor:
    """A link's residual plus the sum of the links before it."""
    return before if own is None else own + before.to(own)
