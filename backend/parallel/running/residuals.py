"""Residuals of ControlNets for rows on their way: computed on their slots meanwhile, and added up where they are used.

Knows no plan and no queue; whoever computes residuals hands in their futures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from torch import Tensor, nn

from backend.nn.deferred_control import add_residual
from backend.nn.program import Addition
from backend.parallel.exchange.transport import Transfer

Transfers = dict[Addition, Transfer]
"""Residuals on their way, by where they are added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlace:
    """Where a ControlNet runs for a replica's rows: its slot, the copy of the network there, and what measured speeds are kept for."""

    slot: int
    network: nn.Module
    work: str = ""
    work_per_row: float = 0.0


class ResidualChain:
    """Residuals of a chain of ControlNets, oldest first: each a future, with the slot that works on it.

    `kinds`: the lists (`Addition.kind`) that may get something. Whoever comes to a place of another kind need not wait.
    """

    def __init__(self, links: Sequence[tuple[int, Future[Transfers]]], kinds: Collection[str]) -> None:
        self._links = tuple(links)
        self.kinds = frozenset(kinds)
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

    def take(self, addition: Addition) -> Tensor | None:
        """What the links add in one place, oldest first, on the thread and the device that adds it; once. All links are done."""
        total: Tensor | None = None
        for _, future in self._links:
            transfer = future.result().pop(addition, None)
            if transfer is not None:
                total = add_residual(transfer.receive(), total) if total is not None else transfer.receive()
        return total


def _failure_of(future: Future[Transfers]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:
        return error
