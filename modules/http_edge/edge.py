"""The one middleware in front of every route: checks the host, the sending site, the credentials and the size of a request.

It wraps everything, including middleware added by extensions. Must not know what a route does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Match, Mount

from modules.app_config import AppConfig
from modules.http_edge.access import ACTING_PATHS, Kind, PageLogins, is_admitted, kind_of, open_parts
from modules.http_edge.bodies import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, BodyRefused, BoundedBody, HeldBytes, too_large
from modules.http_edge.hosts import OwnNames, OwnSites
from modules.http_edge.shown_files import names_no_picture

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ADMITTED = "webui.admitted"
"""Scope key: the edge has already checked the password."""
UPLOAD_PATHS = ("/gradio_api/upload",)
RETRY_AFTER_S = 10
_TEXTS = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 408: "Request Timeout", 413: "Content Too Large", 503: "Service Unavailable"}


class Refused(Exception):
    """The client's answer in place of the route's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Edge:
    """Runs all checks before `app` sees the request. `routes` returns the routes of the running app."""

    def __init__(self, config: AppConfig, routes: Callable[[], list[Any]]) -> None:
        allowed = (*config.allowed_hosts, "*.gradio.live") if config.share else config.allowed_hosts
        names = OwnNames(config.host, allowed, any_name=not open_parts(config) and not OwnNames(config.host).is_local)
        self.config = config
        self.names = names
        self.sites = OwnSites(names, config.cors_origins, config.cors_origins_regex)
        self.page_logins = PageLogins()
        self.held = HeldBytes()
        self._routes = routes

    async def handle(self, app: AsgiApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI request or connection."""
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        try:
            kind = self.check(scope)
        except Refused as refused:
            await self._refuse(refused, scope, receive, send)
            return
        scope[ADMITTED] = True
        if scope["type"] == "websocket":
            await app(scope, receive, send)
        else:
            await self._pass_on(kind, app, scope, receive, send)

    def check(self, scope: Scope) -> Kind:
        """The kind of the requested path. Raises Refused."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        path, method = get_route_path(scope), scope.get("method", "GET")
        if any(char < " " or char == "\x7f" for char in path):  # routes of libraries answer such a path with a 500
            raise Refused(400, "the path holds a control character.")
        is_page = self._reaches_page(scope)
        kind = kind_of(path, is_page=is_page)
        shows_only = is_page and (path.rstrip("/") or "/") not in ACTING_PATHS
        if self.sites.is_foreign("POST" if scope["type"] == "websocket" else method, headers, is_page=shows_only):
            raise Refused(403, _foreign_text(headers))
        if method != "OPTIONS" and not is_admitted(kind, headers, self.config, self.page_logins):
            raise Refused(401, "Incorrect username or password" if headers.get("authorization") else "Not authenticated")
        if names_no_picture(path, self.config.outputs_dir, self.config.gradio_allowed_paths):
            raise Refused(403, "of the outputs folder only pictures are shown.")
        return kind

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            raise Refused(400, "the request has more than one Host header.")
        if hosts and hosts[0] and not self.names.answers_to(hosts[0]):
            name = hosts[0][:200]
            raise Refused(
                403,
                f"this server does not answer to the name {name!r}. Open its own address, or start it with "
                f"--allowed-hosts {name.rpartition(':')[0] or name} if a reverse proxy uses that name.",
            )

    def _reaches_page(self, scope: Scope) -> bool:
        for route in self._routes():
            match, _ = route.matches(dict(scope))  # a copy, because routers may modify it
            if match is not Match.NONE:
                return isinstance(route, Mount) and route.path == ""
        return False

    async def _pass_on(self, kind: Kind, app: AsgiApp, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = get_route_path(scope).startswith(UPLOAD_PATHS)
        max_bytes = MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > max_bytes:
            await self._refuse(Refused(413, too_large(max_bytes)), scope, receive, send)
            return
        body = BoundedBody(receive, max_bytes=max_bytes, held=None if is_upload else self.held)
        answer = _Answer(send, body)
        try:
            await app(scope, body, answer.send)
        except Exception:
            if body.refusal is None:
                raise
        finally:
            body.close()
        if body.refusal is not None and not answer.started:
            await self._refuse(Refused(body.refusal.status, body.refusal.text), scope, receive, send)

    async def _refuse(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 1008})
            return
        log.info(
            "%s %s refused (%d): %s",
            scope.get("method"),
            str(scope.get("path"))[:200].encode("unicode_escape").decode(),
            refused.status,
            refused.text,
        )
        response = JSONResponse(
            {"error": _TEXTS[refused.status], "detail": refused.text, "body": "", "errors": refused.text},
            status_code=refused.status,
            headers=self._headers(refused.status, Headers(scope=scope)),
        )
        with contextlib.suppress(OSError):
            await response(scope, receive, send)

    def _headers(self, status: int, headers: Headers) -> dict[str, str]:
        found = {"WWW-Authenticate": "Basic"} if status == 401 else {}
        if status == 503:
            found["Retry-After"] = str(RETRY_AFTER_S)
        if status in (408, 413):
            found["Connection"] = "close"
        origin = headers.get("origin")
        if origin and self.sites.is_allowed_elsewhere(origin):  # so that the allowed site's page can read the reason
            found |= {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true", "Vary": "Origin"}
        return found


class _Answer:
    """`send` of one request; discards what a route sends after its body was refused."""

    def __init__(self, send: Send, body: BoundedBody) -> None:
        self._send, self._body = send, body
        self.started = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self._body.refusal is not None and not self.started:
            return
        self.started = True
        await self._send(message)


def _foreign_text(headers: Headers) -> str:
    site = (headers.get("origin") or headers.get("referer") or "another site")[:200]
    return (
        f"a page of {site} sent this request; pages of other sites are not allowed. Start the server with --cors-allow-origins {site} to allow it, "
        "or with --allowed-hosts NAME if it is this server's own name behind a reverse proxy."
    )


__all__ = ["ADMITTED", "BodyRefused", "Edge", "Refused"]
