"""How much of each slot a run may use in its plans after running out of memory there. Numbers only."""

from __future__ import annotations

import logging
from collections import Counter

import torch

logger = logging.getLogger(__name__)

_RETRY_SHARE = 0.75
"""Factor for a slot's budget each time it runs out of memory, from the second time on."""
_LAST_SHORTAGE = 5


class SlotBudgets:
    """Shares of slots by index. Example: 1.0; after two shortages 0.75, after three 0.56, after four 0.42, after five 0.0."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}
        self._shortages: Counter[int] = Counter()

    def share_of(self, slot: int) -> float:
        """The share of the slot's memory that the planner may use; 0 if the slot gets no more work."""
        return self._shares.get(slot, 1.0)

    def is_first_shortage(self, slot: int) -> bool:
        """Whether this is the slot's first shortage. Records it."""
        is_first = self._shortages[slot] == 0
        if is_first:
            self._shortages[slot] = 1
        return is_first

    def give_less(self, slot: int, device: torch.device) -> None:
        """Shrink the slot for the planner, and after the fifth shortage remove it."""
        self._shortages[slot] = max(2, self._shortages[slot] + 1)
        self._shares[slot] = _RETRY_SHARE * self.share_of(slot) if self._shortages[slot] < _LAST_SHORTAGE else 0.0
        logger.warning("Out of memory on slot %d (%s): planning again with %.0f %% of its memory.", slot, device, 100 * self._shares[slot])
