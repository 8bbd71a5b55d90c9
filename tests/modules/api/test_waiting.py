"""Waiting requests: no thread each, and none for a disconnected client. Uses a real socket, because the test client never disconnects."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.api.api import create_api
from modules.http_edge.connections import TimedConnection
from modules.http_edge.server import WebServer, create_fastapi_app
from tests.modules.api.conftest import PictureMaker, write_checkpoint_header
from tests.support.applications import installed_application


class Site:
    """A running server whose jobs stop at `gate`."""

    def __init__(self, app: Any, maker: PictureMaker, port: int) -> None:
        self.app, self.maker, self.port = app, maker, port
        self.reached, self.gate = threading.Event(), threading.Event()
        maker.before = self._hold

    def _hold(self, _: Any) -> None:
        self.reached.set()
        while not self.gate.wait(0.005):
            if self.app.state.interrupted:
                return

    def ask(self, **body: Any) -> http.client.HTTPConnection:
        """A txt2img request in progress."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/sdapi/v1/txt2img", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def wait_for(self, condition: Any) -> None:
        deadline = threading.Event()
        for _ in range(4000):
            if condition():
                return
            deadline.wait(0.005)
        raise AssertionError("it did not come about")

    @property
    def num_waiting(self) -> int:
        return len(self.app.jobs.tasks.pending)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "tiny.safetensors")
    with installed_application(tmp_path, api=True, port=0) as app:
        maker = PictureMaker(app)
        fastapi_app = create_fastapi_app(app.config)
        create_api(app, fastapi_app, process=maker)
        server = WebServer(app.config)
        server.start(fastapi_app)
        site = Site(app, maker, server.socket.getsockname()[1])
        try:
            yield site
        finally:
            site.gate.set()
            app.jobs.close()
            server.stop()


def answer_of(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def test_waiting_takes_no_thread_and_the_line_has_an_end(site: Site) -> None:
    site.app.jobs.max_waiting = 60
    first = site.ask(force_task_id="first")
    assert site.reached.wait(30)
    before = threading.active_count()
    waiting = [site.ask() for _ in range(60)]
    site.wait_for(lambda: site.num_waiting == 60)
    assert threading.active_count() - before <= 4  # those of the decoding pool
    one_more = site.ask()
    refused = one_more.getresponse()
    assert (refused.status, refused.getheader("Retry-After")) == (503, "10")
    refused.read()
    one_more.close()
    site.gate.set()
    assert [answer_of(connection)[0] for connection in (first, *waiting)] == [200] * 61


def test_the_job_of_a_client_that_went_away_is_dropped_unless_it_saves(site: Site) -> None:
    running = site.ask(prompt="runs", force_task_id="running")
    assert site.reached.wait(30)
    gone, saving, kept = site.ask(prompt="gone"), site.ask(prompt="saves", save_images=True), site.ask(prompt="stays")
    site.wait_for(lambda: site.num_waiting == 3)
    gone.close()
    site.wait_for(lambda: site.num_waiting == 2)
    saving.close()
    running.close()  # it is interrupted, and the next one starts
    site.wait_for(lambda: "running" in site.app.jobs.tasks.finished)
    site.gate.set()
    assert answer_of(kept)[0] == 200
    assert sorted(p.prompt for p in site.maker.requests) == ["runs", "saves", "stays"]


def test_the_end_of_the_server_answers_who_runs_and_who_waits(site: Site) -> None:
    running = site.ask(prompt="runs")
    assert site.reached.wait(30)
    waiting = site.ask(prompt="waits")
    site.wait_for(lambda: site.num_waiting == 1)
    site.app.jobs.close()
    status, body = answer_of(running)
    assert (status, len(body["images"])) == (200, 1)
    status, body = answer_of(waiting)
    assert status == 503 and "shutting down" in body["detail"]
    status, body = answer_of(site.ask())
    assert status == 503 and "accepts no more jobs" in body["detail"]


def test_a_head_that_is_never_finished_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "head_timeout_s", 0.05)
    for start in (b"", b"GET /internal/ping HTTP/1.1\r\nHost: 127.0"):
        with socket.create_connection(("127.0.0.1", site.port), timeout=30) as slow:
            slow.sendall(start)
            assert slow.recv(100) == b""
    monkeypatch.setattr(TimedConnection, "head_timeout_s", 30)
    assert site.num_waiting == 0


def test_ping_and_progress_answer_while_every_pool_is_busy(site: Site) -> None:
    from modules.api.pools import NUM_DECODERS, NUM_FETCHERS, decoders, fetchers

    gate = threading.Event()
    for pool, number in ((decoders(), NUM_DECODERS), (fetchers(), NUM_FETCHERS)):
        for _ in range(number):
            pool.submit(gate.wait, 60)
    try:
        for method, path, body in (("GET", "/internal/ping", None), ("POST", "/internal/progress", "{}"), ("POST", "/sdapi/v1/interrupt", None)):
            connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            assert answer_of(connection)[0] == 200
    finally:
        gate.set()
