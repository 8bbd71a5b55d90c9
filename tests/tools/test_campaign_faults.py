"""The short form of the campaign of memory faults; the long one is `python -m tools.campaign.memory_faults`."""

from __future__ import annotations

import pytest

from tools.campaign import memory_faults

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_a_shortage_anywhere_gives_the_same_picture_or_a_clear_failure() -> None:
    outcome = memory_faults.run_plan("single", 8)
    assert outcome.found == []
    assert outcome.counts["clear failure"] > 0
    assert outcome.counts["same picture"] > 0
