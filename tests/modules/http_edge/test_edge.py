"""The middleware in front of an app with a few routes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from modules.http_edge import bodies, edge
from modules.http_edge.access import warn_of_open_parts
from modules.http_edge.bodies import BodyRefused, BoundedBody, HeldBytes
from modules.http_edge.server import create_fastapi_app
from modules.launch.cmd_args import config_for_tests

ADDRESS = "http://127.0.0.1:7860"
EVIL = "http://evil.example"


def client_for(tmp_path: Path, **config: Any) -> TestClient:
    app = create_fastapi_app(config_for_tests(tmp_path, **config))

    async def echo(request: Request) -> int:
        return len(await request.body())

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    app.add_api_route("/sdapi/v1/echo", echo, methods=["GET", "POST"])
    app.add_api_route("/guest", echo, methods=["GET", "POST"])
    app.add_api_websocket_route("/talk", talk)
    return TestClient(app, base_url=ADDRESS)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_for(tmp_path) as client:
        yield client


def test_a_foreign_name_is_refused_with_the_remedy(client: TestClient) -> None:
    for path in ("/sdapi/v1/echo", "/guest", "/docs", "/nowhere"):
        refused = client.get(path, headers={"Host": "evil.example:7860"})
        assert refused.status_code == 403
        assert "--allowed-hosts evil.example " in refused.json()["detail"]
    assert client.get("/guest").status_code == 200


def test_a_post_without_body_of_another_site_is_refused(client: TestClient) -> None:
    refused = client.post("/sdapi/v1/echo", headers={"Origin": EVIL})
    assert refused.status_code == 403
    assert "--cors-allow-origins http://evil.example" in refused.json()["detail"]
    assert client.post("/sdapi/v1/echo", headers={"Origin": ADDRESS}).status_code == 200
    assert client.post("/sdapi/v1/echo").status_code == 200


def test_the_cors_flag_lets_a_site_in_and_tells_it_why_it_is_refused(tmp_path: Path) -> None:
    with client_for(tmp_path, cors_origins=(EVIL,), api_auth=(("a", "b"),)) as client:
        preflight = client.options("/sdapi/v1/echo", headers={"Origin": EVIL, "Access-Control-Request-Method": "POST"})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, EVIL)
        refused = client.post("/sdapi/v1/echo", headers={"Origin": EVIL})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, EVIL)
        assert client.post("/sdapi/v1/echo", headers={"Origin": EVIL}, auth=("a", "b")).status_code == 200
        assert client.post("/sdapi/v1/echo", headers={"Origin": "http://other.example"}, auth=("a", "b")).status_code == 403


def test_control_characters_in_a_path_are_refused_before_a_route_sees_them(client: TestClient) -> None:
    for path in ("/guest%00", "/gradio_api/proxy=https://a.hf.space/%00.png", "/file=%0a", "/guest/%7f"):
        answer = client.get(path)
        assert answer.status_code == 400 and "control character" in answer.json()["detail"]
    assert client.get("/guest?name=%00").status_code == 200


def test_web_sockets_are_asked_too(client: TestClient) -> None:
    with client.websocket_connect("ws://127.0.0.1:7860/talk", headers={"Origin": ADDRESS}):
        pass
    for headers in ({"Origin": EVIL}, {"Host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://127.0.0.1:7860/talk", headers=headers):
            pass


def test_a_large_body_is_refused_before_and_while_it_is_read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MAX_BODY_BYTES", 1 << 20)
    assert client.post("/guest", content=bytes(1 << 20)).json() == 1 << 20
    for content in (bytes((1 << 20) + 1), iter([bytes(1 << 19)] * 3)):
        refused = client.post("/guest", content=content)
        assert refused.status_code == 413
        assert "the limit is 1 MiB" in refused.json()["detail"]


def test_all_bodies_together_are_bounded_and_counted_back(client: TestClient) -> None:
    held = client.app.edge.held  # type: ignore[attr-defined]
    held.limit = 1000
    refused = client.post("/guest", content=bytes(1001))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert client.post("/guest", content=bytes(1000)).status_code == 200
    assert held.held == 0


def test_a_body_that_drips_is_given_up() -> None:
    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.001)  # 1 kB a second, whatever the machine
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read(grace_s: float) -> BodyRefused | None:
        body = BoundedBody(drip, max_bytes=1 << 30, held=HeldBytes(), grace_s=grace_s)
        try:
            while True:
                await body()
        except BodyRefused as refusal:
            return refusal

    with ThreadPoolExecutor(1) as pool:
        refusal = pool.submit(lambda: asyncio.run(read(0.05))).result()
    assert refusal is not None and refusal.status == 408


def test_bytes_that_come_earn_time() -> None:
    assert bodies.MAX_BODY_BYTES / bodies.SLOWEST_BYTES_PER_S > bodies.BODY_GRACE_S


def test_who_listens_to_others_without_passwords_is_warned(tmp_path: Path) -> None:
    def warning(**config: Any) -> str | None:
        return warn_of_open_parts(config_for_tests(tmp_path, **config))

    login = (("a", "b"),)
    assert warning() is None
    assert "the page" in str(warning(host="0.0.0.0")) and "the API" not in str(warning(host="0.0.0.0"))
    assert "the page" in str(warning(share=True))
    both = str(warning(host="0.0.0.0", api=True))
    assert "--gradio-auth" in both and "--api-auth" in both
    assert "the page" not in str(warning(host="0.0.0.0", api=True, gradio_auth=login)) and "the API" in str(
        warning(host="0.0.0.0", api=True, gradio_auth=login)
    )
    assert warning(host="0.0.0.0", api=True, gradio_auth=login, api_auth=login) is None
    assert warning(host="0.0.0.0", nowebui=True, api_auth=login) is None


def test_a_server_that_asks_for_passwords_everywhere_answers_to_every_name(tmp_path: Path) -> None:
    login = (("a", "b"),)
    with client_for(tmp_path, host="0.0.0.0", gradio_auth=login) as client:
        assert client.get("/guest", headers={"Host": "sd.example.org"}, auth=login[0]).status_code == 200
    with client_for(tmp_path, host="0.0.0.0") as client:
        assert client.get("/guest", headers={"Host": "sd.example.org"}).status_code == 403
