"""A cache of recently used models in main memory, so that switching back does not read the disk again. Bytes and keys only.

One owner uses it from one thread (the job worker). Knows no files and no devices: a model must be off its devices before it is cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Model = TypeVar("Model")

_SHARE_OF_HOST = 0.4
"""Share of main memory for this cache. The rest is for the model in use, the system and other programs."""


def recent_models_budget_bytes(host_total_bytes: int, host_free_bytes: int) -> int:
    """Bytes that cached models may use: two fifths of main memory, but at most half of what is free now."""
    return int(max(0, min(_SHARE_OF_HOST * host_total_bytes, host_free_bytes / 2)))


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Model]):
    model: Model
    held_bytes: int


class RecentModels(Generic[Model]):
    """Cached models by key. The least recently used are dropped first."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, _Waiting[Model]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        return sum(one.held_bytes for one in self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, key: Hashable, model: Model, held_bytes: int, *, budget_bytes: int, max_models: int) -> tuple[Hashable, ...]:
        """Cache a model. Returns the keys of the models dropped for it, including its own if it does not fit at all."""
        self._waiting.pop(key, None)
        self._waiting[key] = _Waiting(model, held_bytes)
        return self.shrink(budget_bytes=budget_bytes, max_models=max_models)

    def take(self, key: Hashable) -> Model | None:
        """Remove and return a model; None if it is not cached."""
        found = self._waiting.pop(key, None)
        return None if found is None else found.model

    def shrink(self, *, budget_bytes: int, max_models: int) -> tuple[Hashable, ...]:
        """Drop the least recently used models until bytes and number are within the limits. Returns the dropped keys."""
        dropped: list[Hashable] = []
        while self._waiting and (self.held_bytes > budget_bytes or len(self._waiting) > max_models):
            dropped.append(self._waiting.popitem(last=False)[0])
        return tuple(dropped)

    def clear(self) -> None:
        self._waiting.clear()
