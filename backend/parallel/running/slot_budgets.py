"""How much of each slot a run may plan with, after it ran out of memory there. Numbers only."""

from __future__ import annotations

import logging
from collections import Counter

import torch

logger = logging.getLogger(__name__)

_RETRY_SHARE = 0.75
"""What is left of a slot's budget, for the planner, after work on it ran out of memory a second time."""
_LAST_SHORTAGE = 5


class SlotBudgets:
    """Shares of slots by index. Example of one slot: 1.0, after two shortages 0.75, after three 0.56, after four 0.42, after five 0.0."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}
        self._shortages: Counter[int] = Counter()

    def share_of(self, slot: int) -> float:
        """Of the slot's memory, for the planner; 0 for a slot that gets nothing any more."""
        return self._shares.get(slot, 1.0)

    def is_first_shortage(self, slot: int) -> bool:
        """Whether the slot had none before; from now on it had."""
        is_first = self._shortages[slot] == 0
        if is_first:
            self._shortages[slot] = 1
        return is_first

    def give_less(self, slot: int, device: torch.device) -> None:
        """The planner sees a smaller slot from now on, and in the end none."""
        self._shortages[slot] = max(2, self._shortages[slot] + 1)
        self._shares[slot] = _RETRY_SHARE * self.share_of(slot) if self._shortages[slot] < _LAST_SHORTAGE else 0.0
        logger.warning("Out of memory on slot %d (%s): a new plan is made with %.0f %% of its memory.", slot, device, 100 * self._shares[slot])
