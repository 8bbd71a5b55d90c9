"""Runs one early step on one slot to check that dividing pays, since predictions ignore the cost of small kernels. Knows no network.

Once per model, size and number of rows. The fleet keeps the result.
"""

from __future__ import annotations

from backend.parallel.placing.fleet import Fleet, Trial
from backend.parallel.planning.candidate import LEAST_GAIN

_TRIAL_CALL = 2
"""The step, counted from 0, that runs on one slot. Step 0 warms the machine up; steps 1 and 3 are compared with it."""


class StepTrial:
    """Times of the first steps of a run. Example: 90 ms (warm-up), 60 divided, 50 on one slot, 61 divided: dividing does not pay."""

    def __init__(self, fleet: Fleet, key: str) -> None:
        self._fleet, self.key = fleet, key
        self._step_ms: list[float] = []

    @property
    def is_known(self) -> bool:
        return self.key in self._fleet.trials

    @property
    def without_gain(self) -> Trial | None:
        """The trial, if it showed that dividing does not pay; None if dividing pays or no trial was made."""
        trial = self._fleet.trials.get(self.key)
        return trial if trial is not None and trial.speedup < LEAST_GAIN else None

    def is_alone(self, call_number: int) -> bool:
        """Whether that call is the one to run on one slot."""
        return call_number == _TRIAL_CALL

    def is_early(self, call_number: int) -> bool:
        """Whether that call is one of those to time."""
        return call_number <= _TRIAL_CALL + 1

    def note(self, step_ms: float) -> None:
        """Record the time of an early step."""
        self._step_ms.append(step_ms)

    def give_up(self) -> None:
        """One slot has no room for all rows: dividing pays."""
        self._fleet.trials[self.key] = Trial(divided_ms=1.0, alone_ms=float("inf"))

    def judge(self) -> bool:
        """Once the steps before and after the one on one slot are timed, store the result. Returns True if it shows that dividing does not pay."""
        if len(self._step_ms) < _TRIAL_CALL + 2 or self.is_known:
            return False
        before, alone, after = self._step_ms[_TRIAL_CALL - 1 :][:3]
        self._fleet.trials[self.key] = Trial(divided_ms=min(before, after), alone_ms=alone)
        return self.without_gain is not None
