from __future__ import annotations

import threading

from PIL import Image

from modules.jobs.state import State


def test_beginning_forgets_the_last_job() -> None:
    state = State()
    state.interrupt()
    state.skip()
    state.stop_generating()
    state.begin("next")
    assert (state.interrupted, state.skipped, state.stopping_generation, state.job) == (False, False, False, "next")


def test_the_reported_fields_are_those_of_the_contract() -> None:
    assert list(State().dict()) == [
        "skipped",
        "interrupted",
        "stopping_generation",
        "job",
        "job_count",
        "job_timestamp",
        "job_no",
        "sampling_step",
        "sampling_steps",
    ]


def test_previews_are_made_by_the_job_and_numbered() -> None:
    state = State()
    state.begin("x")
    state.preview_maker = lambda latent: Image.new("RGB", (latent, latent))
    state.current_latent = 3
    state.nextjob()
    assert (state.current_image is not None and state.current_image.size, state.id_live_preview, state.job_no) == ((3, 3), 1, 1)


def test_a_server_command_wakes_who_waits_for_it() -> None:
    state = State()
    threading.Timer(0.01, state.request_restart).start()
    assert state.wait_for_server_command(5) == "restart"
    assert state.server_command is None
    assert state.interrupted
