from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from tests.modules.api.conftest import Server, ServerFactory, from_base64


class Paused:
    """Blocks the job at its first step until `go_on`; `reached` tells that it got there."""

    def __init__(self, server: Server) -> None:
        self.state = server.app.state
        self.reached, self.go_on = threading.Event(), threading.Event()
        server.maker.before = self

    def __call__(self, p: Any) -> None:
        self.state.job_count, self.state.sampling_steps, self.state.sampling_step = 1, p.steps, p.steps // 2
        self.state.assign_current_image(Image.new("RGB", (16, 16), "red"))
        self.reached.set()
        self.go_on.wait(60)


def test_progress_of_a_running_job(server: Server) -> None:
    idle = server.get("/sdapi/v1/progress")
    assert (idle["progress"], idle["current_image"]) == (0.0, None)
    paused = Paused(server)
    with ThreadPoolExecutor() as pool:
        job = pool.submit(server.txt2img, steps=10, force_task_id="task(mine)")
        assert paused.reached.wait(60)
        progress = server.get("/sdapi/v1/progress")
        assert progress["progress"] == 0.5
        assert (progress["state"]["sampling_step"], progress["state"]["sampling_steps"], progress["state"]["job_count"]) == (5, 10, 1)
        assert set(progress["state"]) == {
            "skipped", "interrupted", "stopping_generation", "job", "job_count", "job_timestamp", "job_no", "sampling_step", "sampling_steps"
        }  # fmt: skip
        assert from_base64(progress["current_image"]).getpixel((0, 0)) == (255, 0, 0)
        assert server.get("/sdapi/v1/progress", params={"skip_current_image": "true"})["current_image"] is None

        task = server.post("/internal/progress", {"id_task": "task(mine)"})
        assert (task["active"], task["queued"], task["completed"], task["progress"]) == (True, False, False, 0.5)
        prefix, data = task["live_preview"].split(",", 1)
        assert prefix == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)
        known = {"id_task": "task(mine)", "id_live_preview": task["id_live_preview"]}
        assert server.post("/internal/progress", known)["live_preview"] is None
        assert server.post("/internal/progress", {"id_task": "task(mine)", "live_preview": False})["live_preview"] is None
        paused.go_on.set()
        job.result()
    assert server.get("/sdapi/v1/progress")["current_image"] is None
    done = server.post("/internal/progress", {"id_task": "task(mine)"})
    assert (done["active"], done["completed"]) == (False, True)


def test_previews_follow_the_settings(server: Server) -> None:
    server.app.options.set("live_previews_image_format", "jpeg")
    paused = Paused(server)
    with ThreadPoolExecutor() as pool:
        job = pool.submit(server.txt2img, steps=10, force_task_id="task(mine)")
        assert paused.reached.wait(60)
        assert server.post("/internal/progress", {"id_task": "task(mine)"})["live_preview"].startswith("data:image/jpeg")
        server.app.options.set("live_previews_enable", False)
        assert server.post("/internal/progress", {"id_task": "task(mine)"})["live_preview"] is None
        paused.go_on.set()
        job.result()


def test_waiting_jobs_are_pending(server: Server) -> None:
    paused = Paused(server)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.txt2img, force_task_id="task(one)")
        assert paused.reached.wait(60)
        second = pool.submit(server.txt2img, force_task_id="task(two)")
        while server.get("/internal/pending-tasks") != {"size": 1, "tasks": ["task(two)"]}:
            threading.Event().wait(0.01)
        waiting = server.post("/internal/progress", {"id_task": "task(two)"})
        assert (waiting["active"], waiting["queued"], waiting["textinfo"]) == (False, True, "In queue: 1/1")
        paused.go_on.set()
        first.result()
        second.result()


def test_unknown_tasks_are_neither_active_nor_done(server: Server) -> None:
    for body in ({}, {"id_task": None}, {"id_task": "task(none)"}):
        answer = server.post("/internal/progress", body)
        assert (answer["active"], answer["queued"], answer["completed"]) == (False, False, False)


def test_interrupt_and_skip(server: Server) -> None:
    assert server.post("/sdapi/v1/interrupt") == {}
    assert server.app.state.interrupted
    assert server.post("/sdapi/v1/skip") is None
    assert server.app.state.skipped


def test_previews_of_the_page_are_not_shown_where_the_page_alone_asks_for_a_password(start_server: ServerFactory) -> None:
    for flags, is_shown in (({}, True), ({"gradio_auth": (("a", "b"),)}, False), ({"gradio_auth": (("a", "b"),), "api_auth": (("c", "d"),)}, True)):
        with start_server(**flags) as server:
            server.app.state.job_count = 1
            server.app.state.assign_current_image(Image.new("RGB", (8, 8), "red"))
            shown = server.get("/sdapi/v1/progress", auth=("c", "d"))["current_image"]
            assert (shown is not None) is is_shown
            assert server.client.post("/internal/progress", json={"id_task": "x"}).status_code == (401 if "gradio_auth" in flags else 200)
            server.app.jobs.tasks.add("task(of another)")
            waiting = server.get("/internal/pending-tasks", auth=("c", "d") if "api_auth" in flags else ("a", "b"))
            assert waiting == {"size": 1, "tasks": [] if "gradio_auth" in flags else ["task(of another)"]}
