"""ControlNets' residuals that are still to be computed: which rows, with which networks, and how they add up. Knows no slots and no plan.

Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Residuals = dict[str, list[Tensor | None]]
"""What is added, by kind of place in the network (`Addition.kind`); the last of a list is taken first."""
Send = Callable[[Tensor, torch.device], Tensor]


class ControlTask(Protocol):
    """Residuals of one ControlNet for some rows of a call."""

    @property
    def kinds(self) -> frozenset[str]:
        """The lists that it fills. Whoever runs a call waits for the task where the first entry of one of them is added."""
        ...

    @property
    def network(self) -> nn.Module:
        """The ControlNet's own network; a task may run with a copy of it."""
        ...

    @property
    def home(self) -> torch.device:
        """Where `network` runs."""
        ...

    def rows(self, first: int, end: int) -> ControlTask:
        """The task for rows `first` to before `end` alone."""
        ...

    def on(self, device: torch.device, send: Send) -> ControlTask:
        """The task with its inputs sent to `device`."""
        ...

    def run(self, network: nn.Module) -> Residuals:
        """Residuals (B, C, H, W) on the inputs' device, with the weights of `network`, which is there too."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DeferredControl:
    """What a chain of ControlNets adds to a call, oldest link first: residuals that are there already, and tasks."""

    parts: tuple[Residuals | ControlTask, ...]

    def rows(self, first: int, end: int, num_rows: int) -> DeferredControl:
        """The same for rows `first` to before `end` of `num_rows`."""
        return DeferredControl(
            tuple(part.rows(first, end) if not isinstance(part, dict) else residual_rows(part, first, end, num_rows) for part in self.parts)
        )

    def compute(self, device: torch.device) -> Residuals:
        """Residuals of the chain on `device`, by the calling thread, with the ControlNets' own networks where they are."""
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
    """Residuals of these rows; one of a single row counts for all."""
    return {
        kind: [one if one is None or one.shape[0] != num_rows else one[first:end] for one in residuals]
        for kind, residuals in control.items()
        if isinstance(residuals, (list, tuple))
    }


def add_residuals(own: Residuals, before: Mapping[str, Sequence[Tensor | None]]) -> Residuals:
    """Sums where both have a residual; `own` is changed. Lists are filled from the front, so equal indices are equal places."""
    for kind, residuals in before.items():
        mine = own.setdefault(kind, [])
        mine += [None] * (len(residuals) - len(mine))
        for index, residual in enumerate(residuals):
            if residual is not None:
                mine[index] = add_residual(mine[index], residual)
    return own


def add_residual(own: Tensor | None, before: Tensor) -> Tensor:
    """A link's residual plus that of the links before it."""
    return before if own is None else own + before.to(own)
