"""Which password each path needs: one table for the routes of the API, the page, extensions and this program.

| kind | paths | asks for |
|---|---|---|
| open | `/internal/ping`, `/internal/ready`, the login form and its assets | nothing |
| api | `/sdapi/...` | --api-auth |
| page | gradio's, `/internal/progress`, cards, history, queue, files of extensions | --gradio-auth (its cookie, or the same as HTTP basic) |
| guest | all others: `/controlnet/...`, `/docs`, `/internal/sysinfo`, extensions | --api-auth, else --gradio-auth; or the page's cookie |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Literal

from modules.app_config import AppConfig
from modules.http_edge.hosts import is_loopback
from modules.http_edge.passwords import Logins, header_is_known

Kind = Literal["open", "api", "page", "guest"]

PAGE_PREFIXES = ("/sd_extra_networks/", "/webui_history/", "/webui_queue/", "/internal/progress", "/file=", "/gradio_api/file=")
LOGIN_PATHS = frozenset(
    {"/", "/login", "/logout", "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/pwa_icon"}
    | {"/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/login_check", "/gradio_api/token", "/gradio_api/user"}
)
"""Assets of the login form; gradio serves them without revealing anything about the page."""
LOGIN_PREFIXES = ("/static/", "/assets/", "/svelte/")
ACTING_PATHS = frozenset({"/logout"})
"""Page paths that have an effect when merely opened."""


def kind_of(path: str, *, is_page: bool) -> Kind:
    """`is_page`: no route of the API or of an extension matches this path, so gradio handles it."""
    if path in ("/internal/ping", "/internal/ready"):
        return "open"
    if path == "/sdapi" or path.startswith("/sdapi/"):
        return "api"
    if path.startswith(PAGE_PREFIXES):
        return "page"
    if not is_page:
        return "guest"
    plain = path.rstrip("/") or "/"
    return "open" if plain in LOGIN_PATHS or path.startswith(LOGIN_PREFIXES) else "page"


class PageLogins:
    """Who is logged in on the page, according to gradio's app. Without a page, nobody is."""

    def __init__(self) -> None:
        self.find_page_app: Callable[[], Any] = lambda: None

    def is_logged_in(self, cookie_header: str | None) -> bool:
        page = self.find_page_app()
        if page is None or not cookie_header:
            return False
        try:
            cookies = SimpleCookie(cookie_header)
        except CookieError:
            return False
        names = (f"access-token-{page.cookie_id}", f"access-token-unsecure-{page.cookie_id}")
        return any(name in cookies and cookies[name].value in page.tokens for name in names)


def is_admitted(kind: Kind, headers: Mapping[str, str], config: AppConfig, page_logins: PageLogins) -> bool:
    """Whether the request has the credentials its path requires."""
    if kind == "open":
        return True
    wanted = logins_for(kind, config)
    if not wanted or header_is_known(headers.get("authorization"), wanted):
        return True
    return kind != "api" and bool(config.gradio_auth) and page_logins.is_logged_in(headers.get("cookie"))


def logins_for(kind: Kind, config: AppConfig) -> Logins:
    """Logins that open a path of this kind; none means it is open to everyone."""
    if kind == "api":
        return config.api_auth
    if kind == "page":
        return (*config.gradio_auth, *config.api_auth) if config.gradio_auth else ()
    if kind == "guest":
        return config.api_auth or config.gradio_auth
    return ()


def serves_api(config: AppConfig) -> bool:
    return config.api or config.nowebui


def open_parts(config: AppConfig) -> list[str]:
    """The parts that anyone who reaches the address may use."""
    parts = [] if config.nowebui or config.gradio_auth else ["the page (set --gradio-auth USER:PASSWORD)"]
    return parts + (["the API (set --api-auth USER:PASSWORD)"] if serves_api(config) and not config.api_auth else [])


def warn_of_open_parts(config: AppConfig) -> str | None:
    """The warning for a server that others can reach without a password; None if not needed."""
    parts = open_parts(config)
    if not parts or (is_loopback(config.host) and not config.share):
        return None
    reach = "has a public address (--share)" if config.share else f"is reachable from other computers (it listens on {config.host})"
    what = "make pictures, read and change settings, and see what others make"
    return f"This server {reach}, and anyone there may use {' and '.join(parts)}: {what}."
