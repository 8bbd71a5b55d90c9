from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from modules.app_config import AppConfig
from modules.http_edge.server import SubpathApp, WebServer, create_fastapi_app, keep_page_last
from modules.launch.cmd_args import config_for_tests
from modules.launch.errors import SetupError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture
def config(tmp_path: Path) -> AppConfig:
    return config_for_tests(tmp_path, port=free_port())


@pytest.fixture
def server(config: AppConfig) -> Iterator[WebServer]:
    server = WebServer(config)
    yield server
    server.stop()


def test_it_answers_until_it_is_stopped(server: WebServer, config: AppConfig) -> None:
    app = create_fastapi_app(config)
    app.get("/hello")(lambda: "there")
    server.start(app)
    assert server.address == f"http://127.0.0.1:{config.port}"
    assert get(f"{server.address}/hello")[:2] == (200, '"there"')
    server.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "http-server"]
    WebServer(config).stop()


def test_a_port_in_use_is_a_plain_error_that_names_port_and_flag(server: WebServer, config: AppConfig) -> None:
    server.start(create_fastapi_app(config))
    with pytest.raises(SetupError, match=rf"{config.port}.*--port"):
        WebServer(config)


def test_a_proxy_may_hand_on_its_prefix(tmp_path: Path) -> None:
    config = config_for_tests(tmp_path, port=free_port(), subpath="webui")
    app = create_fastapi_app(config)
    app.router.routes.append(Route("/where", lambda request: PlainTextResponse(f"{request.url.path} {request.scope['root_path']}")))
    server = WebServer(config)
    try:
        server.start(app)
        assert server.address.endswith("/webui")
        assert get(f"{server.address}/where")[1] == "/webui/where /webui"
        assert get(f"{server.address.removesuffix('/webui')}/where")[1] == "/where "
        assert get(f"{server.address}ish/where")[0] == 404
    finally:
        server.stop()


def test_other_sites_are_let_in_by_the_flag_alone(tmp_path: Path) -> None:
    closed = create_fastapi_app(config_for_tests(tmp_path))
    opened = create_fastapi_app(config_for_tests(tmp_path, cors_origins=("https://example.org",)))
    assert (len(closed.user_middleware), len(opened.user_middleware)) == (1, 2)  # one compresses the page


def test_routes_added_after_the_page_come_before_it() -> None:
    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse("page")

    app = fastapi.FastAPI()
    app.mount("/", Starlette(routes=[Route("/{path:path}", page)]))
    app.get("/late")(lambda: "late")
    keep_page_last(app)
    assert [getattr(route, "path", None) for route in app.router.routes][-2:] == ["/late", ""]


def test_the_wrapper_leaves_other_messages_alone() -> None:
    seen = []

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        seen.append(scope)

    with ThreadPoolExecutor(1) as pool:  # a browser test in this process leaves an event loop running in this thread
        pool.submit(lambda: asyncio.run(SubpathApp(app, "/x/")({"type": "lifespan"}, None, None))).result()
    assert seen == [{"type": "lifespan"}]


def test_the_page_itself_is_compressed_and_nothing_else_is(server: WebServer, config: AppConfig) -> None:
    app = create_fastapi_app(config)
    text = "a control of the page. " * 10_000
    for path in ("/", "/other"):
        app.get(path)(lambda: PlainTextResponse(text))
    server.start(app)

    def ask(path: str, encoding: str) -> tuple[str | None, bytes]:
        request = urllib.request.Request(f"{server.address}{path}", headers={"Accept-Encoding": encoding})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers.get("content-encoding"), answer.read()

    kind, body = ask("/", "gzip, br")
    assert (kind, gzip.decompress(body).decode()) == ("gzip", text)
    assert len(body) < len(text) / 50
    assert ask("/", "identity") == ask("/other", "gzip") == (None, text.encode())
