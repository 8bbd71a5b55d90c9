"""The short form of the campaigns of memory faults and interrupts; the long one is `python -m tools.campaign.memory_faults` and `.interrupts`."""

from __future__ import annotations

import pytest

from tools.campaign import interrupts, memory_faults

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("plan", ["single", "layers"])
def test_a_shortage_anywhere_gives_the_same_picture_or_a_clear_failure(plan: str) -> None:
    outcome = memory_faults.run_plan(plan, 8)
    assert outcome.found == []
    assert outcome.counts["clear failure"] > 0
    assert outcome.counts["same picture"] > 0


@pytest.mark.parametrize("plan", ["single", "replicas"])
def test_a_stopped_job_ends_and_the_next_is_right(plan: str) -> None:
    outcome = interrupts.run_plan(plan, 4)
    assert outcome.found == []
    assert outcome.counts["interrupt"] + outcome.counts["skip"] == 4
