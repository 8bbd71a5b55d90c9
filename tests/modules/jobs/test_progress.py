from __future__ import annotations

import base64
import io
import time

import pytest
from PIL import Image

from modules.jobs.progress import TaskBook, create_task_id, overall_progress, progress_share, report_task, seconds_left
from modules.jobs.state import State


def running_state() -> State:
    state = State()
    state.begin("txt2img")
    state.job_count, state.job_no = 4, 1
    state.sampling_steps, state.sampling_step = 10, 5
    return state


def test_the_share_counts_parts_and_steps() -> None:
    assert progress_share(running_state()) == 1.5 / 4
    assert progress_share(State()) == 0.0


def test_time_left_follows_from_time_used() -> None:
    state = running_state()
    state.time_start = time.time() - 3
    left = seconds_left(state, 0.25)
    assert left is not None
    assert 8.9 < left < 9.5


def test_a_waiting_task_is_told_its_place() -> None:
    tasks = TaskBook()
    tasks.add("task(a)")
    tasks.add("task(b)")
    report = report_task(tasks, State(), "task(b)")
    assert (report.active, report.queued, report.completed, report.textinfo) == (False, True, False, "In queue: 2/2")
    assert report_task(tasks, State(), "task(unknown)").textinfo == "Waiting..."


def test_a_running_task_gets_each_preview_once() -> None:
    tasks, state = TaskBook(), running_state()
    tasks.start("task(a)")
    state.assign_current_image(Image.new("RGB", (8, 4), "red"))
    first = report_task(tasks, state, "task(a)", known_preview_id=-1)
    assert first.live_preview is not None
    kind, data = first.live_preview.split(",", 1)
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 4)
    assert first.id_live_preview is not None
    again = report_task(tasks, state, "task(a)", known_preview_id=first.id_live_preview)
    assert (again.live_preview, again.id_live_preview) == (None, first.id_live_preview)
    assert report_task(tasks, state, "task(a)", want_preview=False).live_preview is None


@pytest.mark.parametrize("asked", ["task(b)", "task(", "task(A)", "", "*"])
def test_a_preview_is_for_those_who_know_the_running_tasks_id(asked: str) -> None:
    tasks, state = TaskBook(), running_state()
    tasks.start("task(a)")
    tasks.add("task(b)")
    state.assign_current_image(Image.new("RGB", (8, 4), "red"))
    state.textinfo = "step 3"
    report = report_task(tasks, state, asked, known_preview_id=-1)
    assert (report.active, report.live_preview, report.id_live_preview, report.progress, report.eta) == (False, None, -1, None, None)
    assert report.textinfo != "step 3"


def test_no_task_runs_under_no_id() -> None:
    """A job of the API without an id: nobody can ask for its preview here."""
    state = running_state()
    state.assign_current_image(Image.new("RGB", (8, 4), "red"))
    assert report_task(TaskBook(), state, "").live_preview is None


def test_only_the_last_tasks_and_results_are_kept() -> None:
    tasks = TaskBook()
    for number in range(20):
        tasks.finish(f"task({number})")
        tasks.record(f"task({number})", number)
    assert tasks.finished[0] == "task(4)"
    assert tasks.results == [("task(18)", 18), ("task(19)", 19)]


def test_the_api_hears_nothing_when_nothing_runs() -> None:
    report = overall_progress(State())
    assert (report["progress"], report["eta_relative"], report["state"]["job_count"]) == (0.0, 0.0, 0)
    assert overall_progress(running_state())["progress"] == 1.5 / 4


def test_task_ids_have_the_shape_that_the_page_uses() -> None:
    assert create_task_id("txt2img").startswith("task(txt2img-")
