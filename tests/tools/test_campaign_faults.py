"""The short forms of the campaigns of memory faults and of interrupts; the long ones are tools/campaign/memory_faults.py and interrupts.py."""

from __future__ import annotations

import pytest
import torch

from tools.campaign import interrupts, memory_faults
from tools.campaign.guided_job import guided_bed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")]


def test_a_shortage_anywhere_gives_the_same_picture_or_a_clear_failure() -> None:
    outcome = memory_faults.run_plan("single", 8)
    assert outcome.found == []
    assert outcome.counts["clear failure"] > 0
    assert outcome.counts["same picture"] > 0


@pytest.mark.parametrize("plan", ["layers", pytest.param("replicas", marks=pytest.mark.nightly), pytest.param("hybrid", marks=pytest.mark.nightly)])
def test_a_shortage_on_one_of_several_devices(plan: str) -> None:
    """The layers' second fault drives the text encoder away and gives that device a ControlNet of its own: other models, nothing lost."""
    outcome = memory_faults.run_plan(plan, 4)
    assert outcome.found == []
    assert sum(outcome.counts.values()) == 4


@pytest.mark.parametrize("plan", ["single", pytest.param("layers", marks=pytest.mark.nightly), pytest.param("replicas", marks=pytest.mark.nightly)])
def test_a_job_stopped_at_any_operation_leaves_the_next_one_right(plan: str) -> None:
    outcome = interrupts.run_plan(plan, 3)
    assert outcome.found == []
    assert outcome.counts["interrupt"] + outcome.counts["skip"] == 3


def test_bytes_that_belong_to_no_model_are_noticed() -> None:
    with guided_bed("single") as bed:
        before, found = bed.unheld_bytes(), list[str]()
        lost = torch.zeros(2**20, device="vgpu:0")
        assert bed.unheld_bytes() - before == 4 * 2**20
        memory_faults.check_emptied(bed, found)
        assert len(found) == 1 and "bytes stay on the devices" in found[0]
        del lost
        memory_faults.check_emptied(bed, found)
        assert len(found) == 1
