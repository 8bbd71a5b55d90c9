"""What the History tab asks the server: pages of pictures, thumbnails, stars, the trash. Answers are JSON; who may ask is decided before
(modules/http_edge/access.py, as for the page).

Pictures are named by their number in the table, never by a path. Must not know how the table is kept.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import FileResponse

from modules.errors import RequestError
from modules.history.browser import HistoryBrowser
from modules.history.index import MAX_QUERY_CHARACTERS, Picture, Question
from modules.history.trash import picture_below
from modules.ui.page_files import picture_of_page
from modules.ui.said_errors import saying_errors

if TYPE_CHECKING:
    from modules.application import Application

PREFIX = "/webui_history"
PAGE_MAX = 200
_MAX_NUMBER = 2**63 - 1
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
Number = Annotated[int, Query(ge=0, le=_MAX_NUMBER)]
Numbers = Annotated[list[Annotated[int, Query(ge=0, le=_MAX_NUMBER)]], Query(max_length=PAGE_MAX)]


def shown(picture: Picture) -> dict[str, Any]:
    """A row as the page gets it. Numbers are texts: JavaScript's own lose digits."""
    return {
        "number": str(picture.id),
        "name": Path(picture.path).name,
        "path": picture.path,
        "width": picture.width,
        "height": picture.height,
        "bytes": picture.num_bytes,
        "seconds": picture.mtime_ns / 1e9,
        "star": picture.star,
    }


class HistoryRoutes:
    """One method per route."""

    def __init__(self, app: Application, browser: HistoryBrowser) -> None:
        self.app = app
        self.browser = browser

    def check_reading(self) -> None:
        """Raises: RequestError where anyone may open the page and nobody said that they may see all pictures."""
        if not (self.app.config.page_is_trusted or self.app.options.history_for_everyone):
            raise RequestError(
                "The history shows everybody's pictures, and this page has no password. Start with --gradio-auth, or turn on the setting "
                '"Show the history to everyone who can open the page".'
            )

    def check_writing(self) -> None:
        """Raises: RequestError where anyone may open the page."""
        self.check_reading()
        if not self.app.config.page_is_trusted:
            raise RequestError("Pictures cannot be starred or deleted from other computers while the page has no password. Start with --gradio-auth.")

    def page(
        self,
        text: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)] = "",
        folder: Annotated[str, Query(max_length=255)] = "",
        stars: bool = False,
        oldest: bool = False,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        count: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 60,
        look: bool = True,
    ) -> dict[str, Any]:
        """Some of the pictures that are asked for, and how many there are; `look`: look for new files first."""
        self.check_reading()
        is_looking = self.browser.refresh() if look else False
        question = Question(text=text, folder=folder, only_stars=stars, oldest_first=oldest)
        index = self.browser.index
        return {
            "pictures": [shown(picture) for picture in index.page(question, offset, count)],
            "total": index.count(question),
            "folders": index.main_folders(),
            "looking": is_looking,
        }

    def info(self, number: Number) -> dict[str, Any]:
        """One picture with its infotext."""
        self.check_reading()
        picture, _ = self.browser.file_of(number)
        return {**shown(picture), "infotext": picture.infotext}

    def picture(self, number: Number) -> FileResponse:
        """The file itself."""
        self.check_reading()
        _, file = self.browser.file_of(number)
        return FileResponse(picture_of_page(file, self.app.config.outputs_dir), headers=_HEADERS)

    def thumb(self, number: Number) -> FileResponse:
        """A small copy."""
        self.check_reading()
        _, file = self.browser.file_of(number)
        return self._thumb(file)

    def trash_thumb(self, path: Annotated[str, Query(max_length=4096)]) -> FileResponse:
        self.check_reading()
        return self._thumb(picture_below(self.browser.trash.folder, path))

    def _thumb(self, file: Path) -> FileResponse:
        small = self.browser.thumbnails.of(file)
        if small is None:
            raise HTTPException(404, "this file cannot be read as a picture.")
        return FileResponse(small, media_type="image/webp", headers=_HEADERS)

    def star(self, number: Numbers, on: bool = True) -> dict[str, Any]:
        self.check_writing()
        for one in number:
            self.browser.index.set_star(one, on)
        return {}

    def delete(self, number: Numbers) -> dict[str, Any]:
        """Move pictures into the trash."""
        self.check_writing()
        return {"trash": [self.browser.delete(one) for one in number]}

    def trash(self) -> dict[str, Any]:
        """Paths of the deleted pictures."""
        self.check_reading()
        return {"trash": self.browser.trash.list()}

    def restore(self, path: Annotated[list[Annotated[str, Query(max_length=4096)]], Query(max_length=PAGE_MAX)]) -> dict[str, Any]:
        """Put pictures back."""
        self.check_writing()
        return {"restored": [self.browser.restore(one) for one in path]}

    def empty_trash(self) -> dict[str, Any]:
        """Delete them for good."""
        self.check_writing()
        self.browser.trash.empty()
        return {}


def add_routes(app: Application, fastapi_app: FastAPI) -> HistoryBrowser:
    """Add the routes to the server. The application closes the browser."""
    if app.history is None:  # there is one already when the page is rebuilt
        app.history = HistoryBrowser(app.config.outputs_dir, app.config.data_dir)
        app.closers.append(app.history.close)
    browser: HistoryBrowser = app.history
    routes = HistoryRoutes(app, browser)
    add = functools.partial(fastapi_app.add_api_route, include_in_schema=False, response_model=None)
    for name in ("page", "info", "picture", "thumb", "trash_thumb", "trash"):
        add(f"{PREFIX}/{name}", saying_errors(getattr(routes, name)), methods=["GET"])
    for name in ("star", "delete", "restore", "empty_trash"):
        add(f"{PREFIX}/{name}", saying_errors(getattr(routes, name)), methods=["POST"])
    return browser
