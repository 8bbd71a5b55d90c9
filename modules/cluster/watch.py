"""The state of a front's job, kept up to date from the workers that make its pieces. Knows no workers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from modules.cluster.fleet import Progress
from modules.jobs.state import State


class Watch:
    """Progress of a job's pieces together, and what its user asks for.

    A script that makes several requests in one job counts its own parts in `job_count`; each request then fills its share of them.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._pieces: dict[int, Progress] = {}
        self._sizes: list[int] = []
        self._num_skips = 0
        self._is_part = state.job_count > 0
        self._parts_before = state.job_no if self._is_part else 0

    def say(self, text: str | None) -> None:
        """What the page shows below the progress bar."""
        self._state.textinfo = text

    def begin(self, num_batches: Sequence[int]) -> None:
        """The pieces and their batches."""
        self._sizes = list(num_batches)
        if not self._is_part:
            self._state.job_count = sum(num_batches)

    def note(self, index: int, progress: Progress) -> None:
        """Progress of piece `index`."""
        state = self._state
        with self._lock:
            self._pieces[index] = progress
            if not self._is_part:  # hires fix counts two passes per batch, which the worker knows
                state.job_count = sum(max(size, self._count_of(place)) for place, size in enumerate(self._sizes))
            share = sum(piece.share for piece in self._pieces.values())
            state.sampling_steps = max(piece.sampling_steps for piece in self._pieces.values())
            state.job_no = self._parts_before + int(share)
            state.sampling_step = round((share - int(share)) * state.sampling_steps)
            if progress.preview is not None:
                state.assign_current_image(progress.preview)

    def end(self) -> None:
        """All pieces have ended."""
        self._state.job_no = self._parts_before + sum(self._sizes)
        self._state.sampling_step = 0

    def _count_of(self, index: int) -> int:
        piece = self._pieces.get(index)
        return 0 if piece is None else piece.job_count

    def wanted_actions(self) -> list[str]:
        """What workers should be told, each once; a further skip is another entry ("skip 2")."""
        state = self._state
        with self._lock:
            if state.skipped:
                state.skipped = False
                self._num_skips += 1
            skips = [f"skip {number}" for number in range(1, self._num_skips + 1)]
        flags = (("interrupt", state.interrupted), ("stop", state.stopping_generation))
        return [*(action for action, is_wanted in flags if is_wanted), *skips]
