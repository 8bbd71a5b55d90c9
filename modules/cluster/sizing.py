"""How many workers to have, by the length of the queue. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The least and the largest number of workers; None as `most` means as many as the machines hold."""

    least: int
    most: int | None = None


class Sizing:
    """Grows at once, shrinks only after a quiet time: a worker that joins has to load its model again."""

    def __init__(self, size: Size, *, quiet_s: float = 300.0) -> None:
        self._size = size
        self._quiet_s = quiet_s
        self._wanted = size.least
        self._busy_s: float | None = None

    def choose(self, *, num_jobs: int, num_places: int, now_s: float) -> int:
        """Workers wanted for `num_jobs` waiting and running jobs; `num_places` are what the connected machines hold.

        Without limits of the user it is one per place. With them more than the places may be wanted: that is what a cluster that can add machines
        (Kubernetes) reads as its order to do so.
        """
        if self._size.most is None:
            return max(self._size.least, num_places)
        wanted = min(max(num_jobs, self._size.least), self._size.most)
        if wanted >= self._wanted or self._busy_s is None or now_s - self._busy_s >= self._quiet_s or now_s < self._busy_s:
            self._wanted, self._busy_s = wanted, now_s
        return self._wanted
