"""ControlNet residuals for rows in flight: computed on the ControlNets' slots meanwhile, and summed where they are added.

Knows no plan and no queue. The caller provides the futures of the residuals.
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
"""Residuals in transit, by where they are added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlace:
    """Where a ControlNet runs for a replica's rows: its slot, the copy of the network there, and the key of its measured speeds."""

    slot: int
    network: nn.Module
    work: str = ""
    work_per_row: float = 0.0


class ResidualChain:
    """Residuals of a chain of ControlNets, oldest first: a future each, with the slot that computes it.

    `kinds`: the lists (`Addition.kind`) that may receive residuals. Additions of other kinds need not wait.
    """

    def __init__(self, links: Sequence[tuple[int, Future[Transfers]]], kinds: Collection[str]) -> None:
        self._links = tuple(links)
        self.kinds = frozenset(kinds)
        self._lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether all links are done or have failed."""
        return all(future.done() for _, future in self._links)

    def failures(self) -> list[tuple[int, BaseException]]:
        """Slot and error of each link that failed. Waits for all links."""
        found = [(slot, _failure_of(future)) for slot, future in self._links]
        return [(slot, failure) for slot, failure in found if failure is not None]

    def when_ready(self, then: Callable[[], None]) -> None:
        """Call `then()` once: on the thread that finishes the last link, or immediately on this one."""
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
        """The sum of the links' residuals for one addition, oldest first. Call it once, when all links are done, on the adding slot's thread."""
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
