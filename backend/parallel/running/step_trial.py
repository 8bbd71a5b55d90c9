"""One early step done on one slot alone, to see that dividing it pays: predictions know no cost of small kernels. Knows no network.

Once per model, size and number of rows; the result is kept by the fleet.
"""

from __future__ import annotations

from backend.parallel.placing.fleet import Fleet, Trial
from backend.parallel.planning.planner import LEAST_GAIN

_TRIAL_CALL = 2
"""The step, counted from 0, that is done alone; the first warms the machine up, the second is compared with it."""


class StepTrial:
    """Times of the first steps of a run. Example: 90 ms (warm-up), 60 divided, 50 alone, 61 divided: dividing does not pay."""

    def __init__(self, fleet: Fleet, key: str) -> None:
        self._fleet, self.key = fleet, key
        self._step_ms: list[float] = []

    @property
    def is_known(self) -> bool:
        return self.key in self._fleet.trials

    @property
    def without_gain(self) -> Trial | None:
        """The trial that showed that dividing does not pay; None where it does, or none was made."""
        trial = self._fleet.trials.get(self.key)
        return trial if trial is not None and trial.speedup < LEAST_GAIN else None

    def is_alone(self, call_number: int) -> bool:
        """Whether that call is the one to be done on one slot."""
        return call_number == _TRIAL_CALL

    def is_early(self, call_number: int) -> bool:
        """Whether that call is one of those to be timed."""
        return call_number <= _TRIAL_CALL + 1

    def note(self, step_ms: float) -> None:
        """Keep the time of an early step."""
        self._step_ms.append(step_ms)

    def give_up(self) -> None:
        """One slot has no room for all rows: dividing pays."""
        self._fleet.trials[self.key] = Trial(divided_ms=1.0, alone_ms=float("inf"))

    def judge(self) -> bool:
        """After a step on either side of the one alone: keep what was measured. Whether dividing was found not to pay, just now."""
        if len(self._step_ms) < _TRIAL_CALL + 2 or self.is_known:
            return False
        before, alone, after = self._step_ms[_TRIAL_CALL - 1 :][:3]
        self._fleet.trials[self.key] = Trial(divided_ms=min(before, after), alone_ms=alone)
        return self.without_gain is not None
