"""Short versions of the memory fault and interrupt campaigns; the long ones are tools/campaign/memory_faults.py and interrupts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.campaign import interrupts, memory_faults, progress
from tools.campaign.guided_job import guided_bed
from tools.campaign.reporting import Report, write_report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")]


def test_a_shortage_anywhere_gives_the_same_picture_or_a_clear_failure() -> None:
    done = memory_faults.run_plan("single", 8)
    assert done.found == []
    assert {memory_faults.SAME, memory_faults.CLEAR} <= {case.result for case in done.cases}


@pytest.mark.parametrize("plan", ["layers", pytest.param("replicas", marks=pytest.mark.nightly), pytest.param("hybrid", marks=pytest.mark.nightly)])
def test_a_shortage_on_one_of_several_devices(plan: str) -> None:
    """The second fault with layers evicts the text encoder and gives that device its own ControlNet: different models, nothing lost."""
    done = memory_faults.run_plan(plan, 4)
    assert done.found == []
    assert done.done(plan) == {0, 1, 2, 3}


@pytest.mark.parametrize("plan", ["single", pytest.param("layers", marks=pytest.mark.nightly), pytest.param("replicas", marks=pytest.mark.nightly)])
def test_a_job_stopped_at_any_operation_leaves_the_next_one_right(plan: str) -> None:
    done = interrupts.run_plan(plan, 3)
    assert done.found == []
    assert done.done(plan) == {0, 1, 2}


def test_bytes_that_belong_to_no_model_are_noticed() -> None:
    with guided_bed("single") as bed:
        before = bed.unheld_bytes()
        lost = torch.zeros(2**20, device="vgpu:0")
        assert bed.unheld_bytes() - before == 4 * 2**20
        assert any("bytes stay on the devices" in text for text in bed.check_emptied())
        del lost
        assert bed.check_emptied() == []


def test_a_campaign_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    for number in range(3):
        progress.Progress(path).add("single", number, "same picture", ["odd"] if number == 1 else [], 2.0)
    read = progress.Progress(path)
    assert read.done("single") == {0, 1, 2} and read.done("layers") == set()
    assert read.found == ["single: odd"] and read.seconds == 6.0
    assert memory_faults.run_plan("single", 3, read) is read and len(read.cases) == 3  # nothing left to do, so nothing is loaded
    written = write_report(
        Report(
            name="x", question="?", command="run", rows=memory_faults.summarize(read), found=read.found, seconds=read.seconds, commits=read.commits
        ),
        tmp_path,
    )
    assert "| single | 3 | 3 | 3 | 0 | 0 | 1 |" in written.read_text() and "- single: odd" in written.read_text()


def test_faults_are_spread_over_every_device() -> None:
    places = memory_faults.place_faults(8, [100, 50])
    assert [(place.slot, place.at[0]) for place in places] == [(0, 1), (1, 1), (0, 26), (1, 13), (0, 51), (1, 26), (0, 76), (1, 38)]
    assert [place.lasts for place in places] == [False] * 6 + [True] * 2
    several = memory_faults.place_faults(24, [120], per_job=3)
    assert [place.at for place in several[:2]] == [(1, 41, 81), (5, 45, 85)]
    assert [place.at for place in several if place.lasts] == [(13,), (69,)]
