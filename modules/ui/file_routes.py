"""Files of extensions under the addresses that their scripts ask for: `/file=PATH`, as with gradio 3, and gradio's own `/gradio_api/file=PATH`.

Sent is what lies in the folder of an extension that is switched on; nothing hidden, nothing that a link leads out of it. Any other path under
`/file=` is gradio's to answer, which knows the pictures of the page. Relative paths count from the data folder, then from the program's. Who may
ask is decided before (modules/http_edge/access.py). Must not know any extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Match, Route

from modules.app_config import SCRIPT_DIR
from modules.scripts import installed as extensions

if TYPE_CHECKING:
    from modules.application import Application

OLD_ADDRESS, TODAYS_ADDRESS = "/file={path:path}", "/gradio_api/file={path:path}"
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def find_extension_file(path: str, bases: Iterable[Path], folders: Iterable[Path]) -> Path | None:
    """The file below one of `folders` that `path` (relative to one of `bases`) leads to; None for none, a hidden one and one elsewhere."""
    roots = [folder.resolve() for folder in folders]
    for base in bases:
        try:
            found = (base / path).resolve(strict=True)
            inside = next((found.relative_to(root) for root in roots if found.is_relative_to(root)), None)
            if inside is not None and found.is_file() and not any(part.startswith(".") for part in inside.parts):
                return found
        except (OSError, ValueError, RuntimeError):  # not there; a NUL in it; links that lead in a circle
            continue
    return None


class _FoundFileRoute(Route):
    """Takes an address only when it leads to a file of an extension; another one goes on to whatever answers behind it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], find: Callable[[str], Path | None]) -> None:
        super().__init__(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        self._find = find

    def matches(self, scope: Any) -> tuple[Match, Any]:
        match, child_scope = super().matches(scope)
        if match is not Match.NONE and self._find(child_scope["path_params"]["path"]) is None:
            return Match.NONE, {}
        return match, child_scope


def add_routes(app: Application, fastapi_app: FastAPI) -> None:
    """Add both addresses to the server."""
    bases = (app.config.data_dir, SCRIPT_DIR)

    def find(path: str) -> Path | None:
        return find_extension_file(path, bases, [Path(owner.path) for owner in extensions.active()])

    def send(request: Request) -> Response:
        found = find(request.path_params["path"])
        return Response(status_code=404) if found is None else FileResponse(found, headers=_HEADERS)

    def send_or_hand_on(request: Request) -> Response:
        path = request.path_params["path"]
        found = find(path)
        if found is not None:
            return FileResponse(found, headers=_HEADERS)
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"{request.scope.get('root_path', '')}/gradio_api/file={quote(path)}{query}")

    fastapi_app.router.routes.append(_FoundFileRoute(TODAYS_ADDRESS, send, find))
    fastapi_app.router.routes.append(Route(OLD_ADDRESS, send_or_hand_on, methods=["GET"], include_in_schema=False))
