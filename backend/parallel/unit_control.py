"""Residuals of ControlNets for one unit: computed on their slots while the unit is on its way in, and added up where they are used.

Knows no plan and no queue; whoever computes residuals hands in their futures. Shapes: B rows, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backend.nn.deferred_control import add_residual
from backend.parallel.transport import Parcel

Parcels = Mapping[str, Sequence[Parcel | None]]
"""Residuals on their way, by kind of segment; the last of a list is taken first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlace:
    """Where a ControlNet runs for a replica's units: its slot, the copy of the network there, and what measured speeds are kept for."""

    slot: int
    network: nn.Module
    work: str = ""
    work_per_row: float = 0.0


@dataclass(frozen=True, slots=True)
class _Addends:
    """What several links add in one place, oldest link first."""

    parcels: tuple[Parcel, ...]

    def receive(self) -> Tensor:
        total: Tensor | None = None
        for parcel in self.parcels:
            residual = parcel.receive()
            total = residual if total is None else add_residual(residual, total)
        assert total is not None
        return total


class UnitControl:
    """Residuals of a unit's links, oldest first: each a future, with the slot that works on it."""

    def __init__(self, links: Sequence[tuple[int, Future[Parcels]]]) -> None:
        self._links = tuple(links)
        self._placed = False
        self._lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether all links are done, or have failed."""
        return all(future.done() for _, future in self._links)

    def failures(self) -> list[tuple[int, BaseException]]:
        """Slot and error of the links that failed. Waits for all."""
        found = [(slot, _failure_of(future)) for slot, future in self._links]
        return [(slot, failure) for slot, failure in found if failure is not None]

    def when_ready(self, then: Callable[[], None]) -> None:
        """`then()`, once, by the thread that ends the last link, or at once by this one."""
        left = len(self._links)

        def count_down(_: object) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                is_last = left == 0
            if is_last:
                then()

        for _, future in self._links:
            future.add_done_callback(count_down)

    def place(self, control: dict[str, list[Tensor | None]]) -> None:
        """Put what is added from the middle on into a state's lists, once; `receive_next` makes tensors of it. All links are done."""
        if self._placed:
            return
        self._placed = True
        parts = [future.result() for _, future in self._links]
        for kind in ("middle", "output"):
            length = max((len(part.get(kind, ())) for part in parts), default=0)
            control[kind] = [_join([part[kind][index] for part in parts if index < len(part.get(kind, ()))]) for index in range(length)]


def _join(parcels: Sequence[Parcel | None]) -> Tensor | None:
    there = tuple(parcel for parcel in parcels if parcel is not None)
    return _Addends(there) if there else None  # type: ignore[return-value]  # until receive_next


def receive_next(control: Mapping[str, list[Tensor | None]], kind: str) -> None:
    """Make a tensor of what is added next in a segment of that kind, on the thread and the device that adds it."""
    waiting: list[Any] | None = control.get(kind)  # what `place` put there
    if waiting and isinstance(waiting[-1], _Addends):
        waiting[-1] = waiting[-1].receive()


def _failure_of(future: Future[Parcels]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:
        return error
