from __future__ import annotations

import pytest
from PIL import Image

from modules.cluster.fleet import Progress
from modules.cluster.watch import Watch
from modules.jobs.progress import progress_share
from modules.jobs.state import State


def running_state(**fields: int) -> State:
    state = State()
    state.begin("txt2img")
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def test_pieces_count_together() -> None:
    state = running_state()
    watch = Watch(state)
    watch.begin([3, 1])
    watch.note(0, Progress(job_no=1, job_count=3, sampling_step=5, sampling_steps=10))
    watch.note(1, Progress(job_no=0, job_count=1, sampling_step=2, sampling_steps=10))
    assert progress_share(state) == pytest.approx(1.7 / 4)
    watch.end()
    assert progress_share(state) == 1


def test_a_script_with_several_requests_keeps_its_own_count() -> None:
    state = running_state(job_count=4, job_no=2)
    watch = Watch(state)
    watch.begin([1])
    watch.note(0, Progress(job_no=0, job_count=1, sampling_step=5, sampling_steps=10))
    assert (state.job_count, progress_share(state)) == (4, pytest.approx(2.5 / 4))
    watch.end()
    assert (state.job_count, state.job_no) == (4, 3)


def test_two_passes_per_batch_are_counted_as_the_worker_counts_them() -> None:
    state = running_state()
    watch = Watch(state)
    watch.begin([2])
    watch.note(0, Progress(job_no=1, job_count=4, sampling_step=0, sampling_steps=10))
    assert (state.job_count, progress_share(state)) == (4, 0.25)


def test_previews_and_wishes_pass_through() -> None:
    state = running_state()
    watch = Watch(state)
    picture = Image.new("RGB", (2, 2))
    watch.note(0, Progress(preview=picture, preview_id=3))
    assert (state.current_image, state.id_live_preview) == (picture, 1)
    assert watch.wanted_actions() == []
    state.skip()
    state.stop_generating()
    state.interrupt()
    assert watch.wanted_actions() == ["interrupt", "stop", "skip 1"]
    state.skip()
    assert watch.wanted_actions() == ["interrupt", "stop", "skip 1", "skip 2"]
