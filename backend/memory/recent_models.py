"""Models that were used lately and wait in main memory, so that going back to one does not read the disk again. Bytes and keys only.

One owner uses it from one thread (the job worker). It knows no files and no devices: what waits must be off its devices already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Model = TypeVar("Model")

_SHARE_OF_HOST = 0.4
"""Of all main memory; the model in use, the system and other programs have the rest."""


def recent_models_budget_bytes(host_total_bytes: int, host_free_bytes: int) -> int:
    """Bytes that waiting models may hold: two fifths of main memory, and never more than half of what is free now."""
    return int(max(0, min(_SHARE_OF_HOST * host_total_bytes, host_free_bytes / 2)))


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Model]):
    model: Model
    held_bytes: int


class RecentModels(Generic[Model]):
    """Waiting models by key, least recently used first to go."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, _Waiting[Model]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        return sum(one.held_bytes for one in self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, key: Hashable, model: Model, held_bytes: int, *, budget_bytes: int, max_models: int) -> tuple[Hashable, ...]:
        """Let a model wait. Returns the keys of those that had to go for it; its own where it does not fit alone."""
        self._waiting.pop(key, None)
        self._waiting[key] = _Waiting(model, held_bytes)
        return self.shrink(budget_bytes=budget_bytes, max_models=max_models)

    def take(self, key: Hashable) -> Model | None:
        """The model, which waits no longer; None when it is not here."""
        found = self._waiting.pop(key, None)
        return None if found is None else found.model

    def shrink(self, *, budget_bytes: int, max_models: int) -> tuple[Hashable, ...]:
        """Drop the least recently used until bytes and number are within their limits. Returns the dropped keys."""
        dropped: list[Hashable] = []
        while self._waiting and (self.held_bytes > budget_bytes or len(self._waiting) > max_models):
            dropped.append(self._waiting.popitem(last=False)[0])
        return tuple(dropped)

    def clear(self) -> None:
        self._waiting.clear()
