"""How long the parts of the start took, for `--log-startup`. Standard library only."""

from __future__ import annotations

import time


class StartupTimer:
    """Seconds from one `record` to the next, by name, counted from the moment the command was given."""

    def __init__(self, began_s: float | None = None) -> None:
        """`began_s` is wall-clock time, so that it survives the change into the virtual environment."""
        self.began_s = time.time() if began_s is None else began_s
        self.spans_s: dict[str, float] = {}
        self._last_s = self.began_s

    def restart(self, began_s: float) -> None:
        """Counts from `began_s` (wall-clock time), as if nothing had been recorded yet."""
        self.began_s = self._last_s = began_s
        self.spans_s.clear()

    def record(self, name: str) -> None:
        """What was done since the last record was `name`; the same name adds up."""
        now_s = time.time()
        self.spans_s[name] = self.spans_s.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s

    @property
    def total_s(self) -> float:
        """Seconds from the command to the last record."""
        return self._last_s - self.began_s

    def summary(self) -> str:
        """`6.1 s (set-up 0.2 s, import torch 2.3 s, ...)`; parts below 0.05 s are left out."""
        parts = [f"{name} {span_s:.1f} s" for name, span_s in self.spans_s.items() if span_s >= 0.05]
        return f"{self.total_s:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


startup_timer = StartupTimer()
