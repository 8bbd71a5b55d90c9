"""Allows many runs at a time, or one change of the plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class RunGate:
    """Lets several runs in at once (`with gate:`), and lets in a change of the plan only while no run is in progress."""

    _num_running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[threading.Event] = field(default_factory=list)
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> None:
        while True:
            with self._lock:
                if not self._changing.locked():
                    self._num_running += 1
                    return
            with self._changing:  # wait until the change is done
                continue

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_running -= 1
            ended = self._waiting if self._num_running == 0 else ()
            for event in ended:
                event.set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the runs in progress, and keep new ones out."""
        with self._changing:
            ended = threading.Event()
            with self._lock:
                self._waiting.append(ended)
                if self._num_running == 0:
                    ended.set()
            ended.wait()
            self._waiting.remove(ended)
            yield
