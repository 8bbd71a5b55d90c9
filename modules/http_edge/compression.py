"""Compresses the page itself: nearly two megabytes, under a name by which gradio does not know that it is text."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipResponder

COMPRESSED_PATHS = frozenset({"/", "/config"})
MIN_BYTES = 4096
LEVEL = 6


class PageCompression:
    """Middleware; answers at other paths pass unchanged."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_page = scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) in COMPRESSED_PATHS
        if is_page and "gzip" in Headers(scope=scope).get("accept-encoding", ""):
            await GZipResponder(self.app, MIN_BYTES, LEVEL)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
