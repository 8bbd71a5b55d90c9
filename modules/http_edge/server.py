"""Serves the page and the API over HTTP: one FastAPI app, one listening socket, one thread. Must not know what is served.

gradio's page is mounted last, so that it does not hide any earlier route.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import fastapi
import uvicorn
from fastapi.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from modules.app_config import AppConfig
from modules.http_edge.bodies import MAX_UPLOAD_BYTES
from modules.http_edge.compression import PageCompression
from modules.http_edge.connections import TimedConnection
from modules.http_edge.edge import Edge
from modules.http_edge.passwords import is_known
from modules.launch.port import check_port
from modules.launch.version import program_version

if TYPE_CHECKING:
    import gradio

log = logging.getLogger(__name__)

Scope = dict[str, Any]
AsgiApp = Callable[[Scope, Any, Any], Awaitable[None]]

START_TIMEOUT_S = 60.0


class SubpathApp:
    """Lets a proxy forward `/subpath/...` unchanged: the app is told the prefix instead of the proxy stripping it."""

    def __init__(self, app: AsgiApp, subpath: str) -> None:
        self.app = app
        self.prefix = f"/{subpath.strip('/')}"

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] in ("http", "websocket") and (path == self.prefix or path.startswith(f"{self.prefix}/")):
            scope = {**scope, "root_path": self.prefix}
        await self.app(scope, receive, send)


class EdgeApp(fastapi.FastAPI):
    """An app behind `edge`, which also wraps every middleware added by extensions."""

    edge: Edge

    def build_middleware_stack(self) -> Any:
        inner: Any = super().build_middleware_stack()

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            await self.edge.handle(inner, scope, receive, send)

        return guarded


def create_fastapi_app(config: AppConfig) -> EdgeApp:
    """The app for the API's routes and the page. Only `--cors-allow-origins` opens it to other sites."""
    app = EdgeApp(title="WebUI", version=program_version(), docs_url="/docs", redoc_url="/redoc")
    app.edge = Edge(config, lambda: app.router.routes)
    app.add_middleware(PageCompression)
    if config.cors_origins or config.cors_origins_regex:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_origin_regex=config.cors_origins_regex,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
        )
    return app


def mount_page(app: fastapi.FastAPI, demo: gradio.Blocks, config: AppConfig, settings: Mapping[str, Any]) -> None:
    """Serve gradio's page at the root of `app`, behind the --gradio-auth login. `settings` are passed to gradio unchanged."""
    import gradio  # heavy; not needed with --nowebui

    gradio.mount_gradio_app(
        app,
        demo,
        path="/",
        server_name=config.host,
        server_port=config.listen_port,
        auth=(lambda name, password: is_known(name, password, config.gradio_auth)) if config.gradio_auth else None,
        max_file_size=MAX_UPLOAD_BYTES,
        **settings,
    )
    if isinstance(app, EdgeApp):
        page = next(route.app for route in app.router.routes if isinstance(route, Mount) and route.path == "")
        app.edge.page_logins.find_page_app = lambda: page


def keep_page_last(app: fastapi.FastAPI) -> None:
    """Move the page after routes that were added later; otherwise it would shadow them."""
    app.router.routes.sort(key=lambda route: isinstance(route, Mount) and route.path == "")


class WebServer:
    """A running server. The socket is bound in the constructor, so that a port in use is detected before anything slow happens."""

    def __init__(self, config: AppConfig) -> None:
        """Raises launch_errors.SetupError, which names the port and the flag, if the address is not available."""
        self.config = config
        self.socket = _bind(config)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """The URL for a browser on this machine."""
        scheme = "https" if self.config.tls_certfile else "http"
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::", "") else self.config.host
        host = f"[{host}]" if ":" in host else host
        path = f"/{self.config.subpath}" if self.config.subpath else ""
        return f"{scheme}://{host}:{self.socket.getsockname()[1]}{path}"

    def start(self, app: fastapi.FastAPI) -> None:
        """Start answering requests on a separate thread. Raises RuntimeError if the server does not start."""
        config = self.config
        asgi: Any = SubpathApp(app, config.subpath) if config.subpath else app
        self._server = uvicorn.Server(
            uvicorn.Config(
                asgi,
                http=TimedConnection,
                log_level="warning",
                timeout_keep_alive=config.timeout_keep_alive_s,
                ssl_keyfile=config.tls_keyfile,
                ssl_certfile=config.tls_certfile,
                timeout_graceful_shutdown=5,
            )
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, name="http-server", daemon=True)
        self._thread.start()
        self._wait_until_started()

    def _wait_until_started(self) -> None:
        assert self._server is not None
        assert self._thread is not None
        waited = threading.Event()
        for _ in range(int(START_TIMEOUT_S / 0.01)):
            if self._server.started:
                return
            if not self._thread.is_alive():
                break
            waited.wait(0.01)
        raise RuntimeError(f"the server at {self.address} did not start; see the log above.")

    def stop(self) -> None:
        """Finish answers in progress (at most 5 s) and release the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10)
        self.socket.close()


def _bind(config: AppConfig) -> socket.socket:
    host, port = config.host, config.listen_port
    check_port(host, port)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    if os.name != "nt":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError:
        listening.close()
        check_port(host, port)  # taken in the meantime; this raises the right message
        raise
    listening.set_inheritable(False)
    return listening


def open_browser(address: str) -> None:
    """Open the page in a browser."""
    webbrowser.open(address)


def open_tunnel(server: WebServer) -> str | None:
    """A public address for this server (--share), or None with the reason in the log."""
    import secrets

    import httpx
    from gradio import networking  # heavy; only with --share
    from gradio.exceptions import ChecksumMismatchError

    try:
        return str(networking.setup_tunnel(server.config.host, server.socket.getsockname()[1], secrets.token_urlsafe(32), None, None))
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, ChecksumMismatchError) as error:
        log.warning("--share: could not get a public address (%s); the page is only reachable at %s.", error, server.address)
        return None
