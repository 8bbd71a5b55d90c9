"""Every route of the running program, with and without each kind of password."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.routing import Mount

from modules.api.api import create_api
from modules.http_edge.access import kind_of
from modules.http_edge.server import create_fastapi_app, keep_page_last, mount_page
from modules.scripts import callbacks
from modules.ui import extra_networks_routes, file_routes, page
from modules.ui import tabs as ui
from tests.support.applications import installed_application
from tests.support.event_loops import close_event_loops as close_event_loops
from tests.support.extensions import loaded_builtin, write_extension

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning")]

API_LOGIN, PAGE_LOGIN = ("api", "api-secret"), ("page", "page-secret")
GUEST = {
    "scripts/guest.py": """
        from modules import script_callbacks

        def add(demo, app):
            app.add_api_route("/guest/ask", lambda: "told", methods=["GET"])

        script_callbacks.on_app_started(add)
        """
}
ACCESS = {  # kind of path -> who gets access, by the flags given: (neither, --api-auth, --gradio-auth, both)
    "open": ("all", "all", "all", "all"),
    "api": ("all", "api", "all", "api"),
    "page": ("all", "all", "page", "page api"),
    "guest": ("all", "api", "page", "page-cookie api"),
}


@contextmanager
def whole_program(folder: Path, **config: Any) -> Iterator[tuple[TestClient, dict[tuple[str, str], str]]]:
    """The program as served with these flags, and its routes: (method, path) -> kind."""
    with installed_application(folder, port=7860, **config) as app:
        write_extension(app, "guest", GUEST)
        with loaded_builtin(app, "sd_forge_controlnet", "sd_forge_lora"):
            fastapi_app = create_fastapi_app(app.config)
            create_api(app, fastapi_app)
            extra_networks_routes.add_routes(app, fastapi_app)
            file_routes.add_routes(app, fastapi_app)
            mount_page(fastapi_app, ui.create_ui(app), app.config, page.page_settings(app.config))
            callbacks.app_started_callback(None, fastapi_app)
            keep_page_last(fastapi_app)
            yield TestClient(fastapi_app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False), routes_of(fastapi_app)


def routes_of(app: Any) -> dict[tuple[str, str], str]:
    found = {}
    for route in app.router.routes:
        is_page = isinstance(route, Mount) and route.path == ""
        for one in flat(route.app.router.routes if is_page else [route]):
            path = re.sub(r"\{.*?\}", "x", one.path)
            for method in getattr(one, "methods", None) or {"GET"}:
                found.setdefault((method, path), kind_of(path, is_page=is_page))  # the page comes last
    return found


def flat(routes: Any) -> Iterator[Any]:
    """Routes, including those of nested routers."""
    for route in routes:
        inner = getattr(route, "effective_route_contexts", None)
        yield from inner() if inner else [route]


def is_refused(client: TestClient, method: str, path: str, **arguments: Any) -> bool:
    """By the edge or by the route. A streaming route that grants access would never end, so for those only the edge is asked."""
    from modules.http_edge.edge import Refused

    headers = {"host": "127.0.0.1:7860", **arguments.get("headers", {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    try:
        client.app.edge.check(scope)  # type: ignore[attr-defined]
    except Refused as refused:
        assert refused.status == 401
        assert client.request(method, path, headers=headers).status_code == 401
        return True
    return False


def basic(login: tuple[str, str]) -> dict[str, str]:
    import base64

    return {"authorization": "Basic " + base64.b64encode(":".join(login).encode()).decode()}


def who_is_let_in(client: TestClient, method: str, path: str, cookie: str) -> set[str]:
    callers: dict[str, dict[str, str]] = {"nobody": {}, "wrong": basic(("api", "wrong")), "api": basic(API_LOGIN), "page": basic(PAGE_LOGIN)}
    callers |= {"page-cookie": {"cookie": cookie}} if cookie else {}
    return {name for name, headers in callers.items() if not is_refused(client, method, path, headers=headers)}


def log_in(client: TestClient) -> str:
    """The cookie of the page's login."""
    assert client.post("/login", data={"username": "page", "password": "wrong"}).status_code == 400
    assert client.post("/login", data={"username": "page", "password": "page-secret"}).status_code == 200
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items() if "unsecure" in name)
    client.cookies.clear()
    return cookie


@pytest.mark.parametrize("flags", range(4), ids=["neither", "--api-auth", "--gradio-auth", "both"])
def test_every_route_asks_for_what_its_kind_asks_for(flags: int, tmp_path: Path) -> None:
    config = {"api_auth": (API_LOGIN,)} if flags & 1 else {}
    config |= {"gradio_auth": (PAGE_LOGIN,)} if flags & 2 else {}
    with whole_program(tmp_path, api=True, **config) as (client, routes):
        paths = {path for _, path in routes}
        assert {"/sdapi/v1/txt2img", "/controlnet/detect", "/sdapi/v1/loras", "/guest/ask", "/docs", "/openapi.json", "/internal/progress"} <= paths
        assert {
            "/gradio_api/queue/join",
            "/gradio_api/upload",
            "/gradio_api/cancel",
            "/config",
            "/internal/sysinfo",
            "/internal/pending-tasks",
        } <= paths
        cookie = log_in(client) if flags & 2 else ""
        for (method, path), kind in routes.items():
            if method == "OPTIONS":
                continue
            rule = ACCESS[kind][flags]
            expected = {"nobody", "wrong", "api", "page"} if rule == "all" else set(rule.split())
            expected |= {"page-cookie"} if (cookie and kind != "api") or (cookie and rule == "all") else set()
            assert who_is_let_in(client, method, path, cookie) == expected, (method, path, kind)
        for path in ("/controlnet/version", "/guest/ask", "/internal/pending-tasks", "/docs"):
            assert client.get(path).status_code == (200 if flags == 0 else 401), path
        login = API_LOGIN if flags & 1 else PAGE_LOGIN
        assert client.get("/controlnet/version", auth=login).json() == {"version": 2}


def test_without_the_api_there_is_no_route_of_it(tmp_path: Path) -> None:
    with whole_program(tmp_path) as (client, routes):
        assert not [path for _, path in routes if path.startswith(("/sdapi", "/controlnet"))]
        assert client.post("/gradio_api/queue/join", json={}, headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get("/gradio_api/queue/data?session_hash=x", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/logout", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 403
        assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
