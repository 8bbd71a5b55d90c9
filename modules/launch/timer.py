"""Measures how long each part of startup took, for `--log-startup`, and whatever extensions time with it. Standard library only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Timer:
    """Seconds between calls of `record`, by name. The clock starts when the timer is created, or at `began_s`."""

    def __init__(self, began_s: float | None = None) -> None:
        """`began_s` is wall-clock time, so that it survives the restart inside the virtual environment."""
        self.began_s = time.time() if began_s is None else began_s
        self.spans_s: dict[str, float] = {}
        self._above = ""
        self._last_s = self.began_s

    def restart(self, began_s: float) -> None:
        """Start counting at `began_s` (wall-clock time) with no records."""
        self.began_s = self._last_s = began_s
        self.spans_s.clear()

    def record(self, category: str, extra_time: float = 0) -> None:
        """Count the seconds since the last record, plus `extra_time`, under `category`. Repeated names add up."""
        name = f"{self._above}{category}"
        self.spans_s[name] = self.spans_s.get(name, 0.0) + self.elapsed() + extra_time

    def elapsed(self) -> float:
        """Seconds since the last record or call of this; the clock restarts."""
        now_s = time.time()
        span_s, self._last_s = now_s - self._last_s, now_s
        return span_s

    @contextlib.contextmanager
    def subcategory(self, name: str) -> Iterator[None]:
        """Record parts inside the block as `name/part`. Time that no part claims is recorded as `name` at the end."""
        above = self._above
        self.elapsed()
        self._above = f"{above}{name}/"
        try:
            yield
        finally:
            self._above = above
            self.record(name)

    def reset(self) -> None:
        """Restart now, without records."""
        self.restart(time.time())

    @property
    def records(self) -> dict[str, float]:
        """Seconds by name, under the name that extensions read."""
        return self.spans_s

    @property
    def total(self) -> float:
        return self.total_s

    def dump(self) -> dict[str, Any]:
        """All seconds as JSON values."""
        return {"total": self.total_s, "records": dict(self.spans_s)}

    @property
    def total_s(self) -> float:
        """Seconds from the command to the last record."""
        return self._last_s - self.began_s

    def summary(self) -> str:
        """`6.1 s (setup 0.2 s, import torch 2.3 s, ...)`; parts below 0.05 s are left out."""
        parts = [f"{name} {span_s:.1f} s" for name, span_s in self.spans_s.items() if span_s >= 0.05]
        return f"{self.total_s:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


startup_timer = Timer()
