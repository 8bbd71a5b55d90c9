"""Jobs that wait for a worker, and which of them is next. Pure: times are passed in.

A job whose checkpoint an idle worker has loaded goes first, though an older job waits that would cost a load: under load this is what keeps workers
from changing checkpoints all the time. It goes first only until the older one is overdue.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from modules.cluster.routing import Need, Router

KeyT = TypeVar("KeyT")

OVERDUE_LOADS = 6.0
"""After waiting for this many times a load, nobody goes before a job any more."""


@dataclass(kw_only=True, slots=True)
class _Waiting(Generic[KeyT]):
    number: int
    key: KeyT
    need: Need
    since_s: float


class Backlog(Generic[KeyT]):
    """Waiting jobs by checkpoint, each checkpoint's in order of arrival. Not thread-safe: its owner holds a lock."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._by_checkpoint: dict[str, dict[int, _Waiting[KeyT]]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._by_checkpoint.values()))

    def add(self, key: KeyT, need: Need, now_s: float) -> int:
        """A job waits from now on; returns its number, for remove()."""
        number = next(self._numbers)
        self._by_checkpoint.setdefault(need.checkpoint, {})[number] = _Waiting(number=number, key=key, need=need, since_s=now_s)
        return number

    def remove(self, number: int) -> None:
        """The job waits no longer. A number that is not known is ignored."""
        for checkpoint, waiting in self._by_checkpoint.items():
            if waiting.pop(number, None) is not None:
                if not waiting:
                    del self._by_checkpoint[checkpoint]
                return

    def place_next(self, now_s: float) -> tuple[KeyT, str] | None:
        """A job and its worker, whose room is then taken; None if no job can go now."""
        if not self._by_checkpoint or not self._router.num_idle():
            return None
        for one in self._in_order(now_s):
            worker = self._router.place(one.need, waited_s=max(0.0, now_s - one.since_s))
            if worker is not None:
                self.remove(one.number)
                return one.key, worker
        return None

    def seconds_to_next_change(self, now_s: float) -> float | None:
        """When to ask again though no worker changed: a waiting job may lose patience. None if nothing waits."""
        oldest = min((one.since_s for one in self._heads()), default=None)
        return None if oldest is None else max(0.05, self._router.load_s - (now_s - oldest))

    def _in_order(self, now_s: float) -> Iterator[_Waiting[KeyT]]:
        """The jobs to try: overdue ones, then those whose checkpoint is loaded on an idle worker, then the others; older ones first."""
        overdue_s = OVERDUE_LOADS * self._router.load_s
        heads = sorted(self._heads(), key=lambda one: one.number)
        overdue = [one for one in heads if now_s - one.since_s > overdue_s]
        ready = [one for one in heads if self._router.has_idle(one.need.checkpoint)]
        seen: set[int] = set()
        for one in (*overdue, *ready, *heads):
            if one.number not in seen:
                seen.add(one.number)
                yield one
        for waiting in self._by_checkpoint.values():  # a head that may not run where there is room must not hold up those behind it
            for one in waiting.values():
                if one.number not in seen and one.need.excluded != _head(waiting).need.excluded:
                    yield one

    def _heads(self) -> list[_Waiting[KeyT]]:
        return [_head(waiting) for waiting in self._by_checkpoint.values()]


def _head(waiting: dict[int, _Waiting[KeyT]]) -> _Waiting[KeyT]:
    return next(iter(waiting.values()))
