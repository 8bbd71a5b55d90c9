"""Counts jobs and how long they wait and run, for /metrics. Knows neither the queue nor HTTP."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of the histograms' buckets; times above the last are counted in one more."""


@dataclass
class Histogram:
    """Times in seconds, by bucket. `counts` has one entry per bound and one for what is above all of them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def note(self, seconds: float) -> None:
        """A time of `seconds`; a negative one, from a clock that was set back, counts as 0."""
        seconds = max(0.0, seconds)
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def cumulative(self) -> list[int]:
        """For each bucket the number of times at or below its bound, as Prometheus wants them; the last is the number of all."""
        total = 0
        return [total := total + count for count in self.counts]


class JobMeter:
    """What a job queue has done since the start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.wait_s = Histogram()
        self.run_s = Histogram()
        self.num_ended: Counter[str] = Counter()
        self.num_refused = 0

    def note_wait(self, seconds: float) -> None:
        """A job waited `seconds` and starts."""
        with self._lock:
            self.wait_s.note(seconds)

    def note_end(self, seconds: float, *, is_failed: bool) -> None:
        """A job ended after running for `seconds`."""
        with self._lock:
            self.run_s.note(seconds)
            self.num_ended["failed" if is_failed else "finished"] += 1
