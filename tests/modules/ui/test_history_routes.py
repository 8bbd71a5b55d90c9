"""The routes behind the History and Queue tabs: what they answer, to whom, and what they refuse."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from modules.application import Application
from modules.http_edge.access import kind_of
from modules.ui import history_routes, queue_routes
from modules.ui.history import _sender
from tests.support.applications import installed_application
from tests.support.event_loops import close_event_loops as close_event_loops


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        folder = app.config.outputs_dir / "txt2img-images"
        folder.mkdir(parents=True)
        for name in ("cat", "dog"):
            data = PngImagePlugin.PngInfo()
            data.add_text("parameters", f"a {name}")
            Image.new("RGB", (16, 8)).save(folder / f"{name}.png", pnginfo=data)
        yield app


@pytest.fixture
def client(app: Application) -> Iterator[TestClient]:
    server = FastAPI()
    history_routes.add_routes(app, server)
    queue_routes.add_routes(app, server)
    with TestClient(server) as client:
        yield client


def pictures(client: TestClient, **question: Any) -> list[dict[str, Any]]:
    return list(client.get("/webui_history/page", params=question).json()["pictures"])


def test_a_picture_is_found_shown_starred_deleted_and_put_back(client: TestClient, app: Application) -> None:
    (found,) = pictures(client, text="cat")
    assert (found["path"], found["width"], found["height"], found["star"]) == ("txt2img-images/cat.png", 16, 8, False)
    number = {"number": found["number"]}
    assert client.get("/webui_history/info", params=number).json()["infotext"] == "a cat"
    assert client.get("/webui_history/thumb", params=number).headers["content-type"] == "image/webp"
    assert client.get("/webui_history/picture", params=number).content == (app.config.outputs_dir / "txt2img-images/cat.png").read_bytes()
    client.post("/webui_history/star", params=number)
    assert [one["path"] for one in pictures(client, stars=True)] == ["txt2img-images/cat.png"]
    assert client.post("/webui_history/delete", params=number).json() == {"trash": ["txt2img-images/cat.png"]}
    assert client.get("/webui_history/info", params=number).status_code == 400
    assert client.get("/webui_history/trash").json() == {"trash": ["txt2img-images/cat.png"]}
    assert client.get("/webui_history/trash_thumb", params={"path": "txt2img-images/cat.png"}).status_code == 200
    client.post("/webui_history/restore", params={"path": "txt2img-images/cat.png"})
    assert [one["star"] for one in pictures(client, text="cat")] == [True]
    client.post("/webui_history/delete", params={"number": pictures(client, text="cat")[0]["number"]})
    client.post("/webui_history/empty_trash")
    assert client.get("/webui_history/trash").json() == {"trash": []}
    assert (app.config.outputs_dir / "txt2img-images/dog.png").exists()


@pytest.mark.parametrize(
    ("method", "path", "params"),
    [
        ("GET", "page", {"offset": -1}),
        ("GET", "page", {"count": 100_000}),
        ("GET", "page", {"offset": 10**40}),
        ("GET", "page", {"text": "x" * 5000}),
        ("GET", "info", {"number": 2**70}),
        ("GET", "info", {"number": 5}),
        ("GET", "thumb", {"number": "../../etc/passwd"}),
        ("GET", "trash_thumb", {"path": "../../../config.json"}),
        ("GET", "trash_thumb", {"path": "/etc/hostname\0"}),
        ("POST", "restore", {"path": "../txt2img-images/dog.png"}),
        ("POST", "restore", {"path": ["a"] * 500}),
        ("POST", "delete", {"number": [1] * 500}),
        ("POST", "delete", {"number": 7}),
    ],
)
def test_hostile_questions_are_refused(client: TestClient, app: Application, method: str, path: str, params: dict[str, Any]) -> None:
    answer = client.request(method, f"/webui_history/{path}", params=params)
    assert answer.status_code in (400, 422)
    assert (app.config.outputs_dir / "txt2img-images/dog.png").exists()


def on_the_net(app: Application, **changes: Any) -> None:
    app.config = dataclasses.replace(app.config, host="0.0.0.0", **changes)


def test_a_page_open_to_everyone_shows_no_history_unless_somebody_said_so(client: TestClient, app: Application) -> None:
    (found,) = pictures(client, text="cat")
    on_the_net(app)
    for path in ("page", "info", "thumb", "picture"):
        answer = client.get(f"/webui_history/{path}", params={"number": found["number"]})
        assert (answer.status_code, "--gradio-auth" in answer.json()["detail"]) == (400, True)
    app.options.history_for_everyone = True
    assert len(pictures(client)) == 2
    answer = client.post("/webui_history/delete", params={"number": found["number"]})
    assert (answer.status_code, "no password" in answer.json()["detail"]) == (400, True)
    on_the_net(app, gradio_auth=(("me", "secret"),))
    assert client.post("/webui_history/star", params={"number": found["number"]}).status_code == 200


def test_who_may_ask_is_decided_as_for_the_page() -> None:
    assert {kind_of(f"/{prefix}/x", is_page=False) for prefix in ("webui_history", "webui_queue")} == {"page"}


def test_only_a_number_of_the_table_is_sent_to_a_tab(client: TestClient, app: Application) -> None:
    (found,) = pictures(client, text="dog")
    send = _sender(app, None, takes_picture=True)
    assert send(found["number"]) == [str((app.config.outputs_dir / "txt2img-images/dog.png").resolve())]
    for number in ("", "-1", "9" * 5000, "../x", "²"):
        (update,) = send(number)
        assert not isinstance(update, str)


def test_jobs_are_shown_moved_ended_and_repeated(client: TestClient, app: Application) -> None:
    started, gate = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        gate.wait(10)

    def add(task_id: str) -> Any:
        return app.jobs.submit(task_id, "txt2img", lambda: None, label="a secret prompt", repeat=add)

    holding = app.jobs.submit(None, "img2img", hold)
    started.wait(5)
    one, two = add("task(one)"), add("task(two)")
    try:
        jobs = client.get("/webui_queue/jobs").json()["jobs"]
        assert [(job["tab"], job["label"], job["state"]) for job in jobs] == [
            ("img2img", "", "running"),
            ("txt2img", "a secret prompt", "waiting"),
            ("txt2img", "a secret prompt", "waiting"),
        ]
        client.post("/webui_queue/move", params={"number": two.number, "places": -1})
        assert [job["number"] for job in client.get("/webui_queue/jobs").json()["jobs"]] == [holding.number, two.number, one.number]
        assert client.post("/webui_queue/repeat", params={"number": one.number, "task_id": "task(three)"}).json()["tab"] == "txt2img"
        for task_id in ("three", "task(<script>)", "task()"):
            assert client.post("/webui_queue/repeat", params={"number": one.number, "task_id": task_id}).status_code == 400
        assert client.post("/webui_queue/end", params={"number": 99}).status_code == 400

        app.config = dataclasses.replace(app.config, gradio_auth=(("me", "secret"),))
        jobs = client.get("/webui_queue/jobs", params={"own": ["task(one)"]}).json()["jobs"]
        assert {job["number"]: (job["label"], job["own"]) for job in jobs if job["number"] in (one.number, two.number)} == {
            one.number: ("a secret prompt", True),
            two.number: ("", False),
        }
        assert client.post("/webui_queue/end", params={"number": two.number, "own": ["task(one)"]}).status_code == 400
        assert client.post("/webui_queue/end", params={"number": one.number, "own": ["task(one)"]}).status_code == 200
    finally:
        gate.set()
        holding.wait(5)
