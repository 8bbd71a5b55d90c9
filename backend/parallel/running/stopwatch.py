"""Measures how long a slot is busy without making it wait. Knows no rows and no plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from backend import profiler
from backend.profiler import Mark


class Stopwatch:
    """Times how long a slot is busy with a stage: on CUDA by events that are read later, without waiting; elsewhere by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.started: Mark = profiler.recorder().mark(device)

    def stop(self, tell: Callable[[float], None]) -> Mark:
        """Mark the end. Calls `tell` with the milliseconds since the start: now or, on CUDA, once they are known. Returns the mark."""
        ended = profiler.mark_now(self._device)
        if isinstance(ended, int):
            tell((ended - self.started) / 1e6)
        else:
            _EventReader.add(self.started, ended, tell)
        return ended


class _EventReader:
    """Pairs of CUDA events that have not completed. Adding a pair reports the older pairs that have."""

    _waiting: list[tuple[Any, Any, Callable[[float], None]]] = []
    _lock = threading.Lock()

    @classmethod
    def add(cls, start: Any, end: Any, tell: Callable[[float], None]) -> None:
        with cls._lock:
            cls._waiting.append((start, end, tell))
            passed = [one for one in cls._waiting if one[1].query()]
            cls._waiting[:] = [one for one in cls._waiting if one not in passed]
        for first, last, report in passed:
            report(first.elapsed_time(last))
