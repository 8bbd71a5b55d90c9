"""Many runs at a time, or one change of the plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class RunGate:
    """Lets runs in side by side, and whoever wants to change the plan when none is under way."""

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
        """Holds new runs back and waits for those under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            yield
