"""Allows many runs at a time, or one change of the plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class RunGate:
    """Lets several runs in at once, and lets in a change of the plan only while no run is in progress."""

    _running: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._changed:
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the runs in progress, and keep new ones out."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            yield
