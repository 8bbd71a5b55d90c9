"""The progress bar of a job in the terminal: one for all its passes, with iterations per second and the time left."""

from __future__ import annotations

import sys
from typing import Any


class JobBar:
    """The job calls `begin` and `end`, its samplers the rest. Draws nothing without `begin`, or if output is not a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, *, is_hidden: bool) -> None:
        """A job starts. The bar appears with its first pass."""
        from tqdm import tqdm  # only needed once a job runs

        self.end()
        self._bar = tqdm(total=0, disable=is_hidden or not sys.stderr.isatty(), leave=False, unit="it", dynamic_ncols=True, delay=1e-9)

    def begin_pass(self, num_steps: int, *, passes_left: int) -> None:
        """A sampler starts. `passes_left`, including this one, are assumed to have the same number of steps."""
        if self._bar is not None:
            self._bar.total = self._bar.n + num_steps * max(1, passes_left)
            if self._bar.n == 0:
                self._bar.unpause()
            self._bar.refresh()

    def note_step(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
