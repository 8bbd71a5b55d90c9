"""Routes the browser uses while cards are shown: preview pictures, a file's metadata, one refreshed card.

Only pictures are sent, and only from the folders of the pages. Must not know any kind of model.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse

from modules.ui import extra_networks
from modules.ui.extra_networks import PREVIEW_SUFFIXES, extra_pages, plain_path

if TYPE_CHECKING:
    from modules.application import Application

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}


def find_picture(filename: str) -> Path:
    """The picture that a browser may request under that name. Raises HTTPException 404 for anything else."""
    path = plain_path(filename)
    below = any(path.is_relative_to(plain_path(folder)) for page in extra_pages for folder in page.allowed_directories_for_previews())
    if "\0" in filename or not below or path.suffix.lower() not in PREVIEW_SUFFIXES or not path.is_file():
        raise HTTPException(404, "there is no such preview picture.")
    return path


def add_routes(app: Application, fastapi_app: FastAPI) -> None:
    """Add /sd_extra_networks/... to the server. With a password set, the routes answer only to URLs that the page itself contains."""
    extra_networks.ask_for_key(secrets.token_urlsafe(24) if app.config.gradio_auth or app.config.api_auth else "")

    def check(key: str) -> None:
        if not extra_networks.key_is_right(key):
            raise HTTPException(401, "this is available only from the page, after login.")

    @fastapi_app.get("/sd_extra_networks/thumb")
    def thumb(filename: str = "", key: str = "") -> FileResponse:
        check(key)
        return FileResponse(find_picture(filename), headers=_HEADERS)

    @fastapi_app.get("/sd_extra_networks/metadata")
    def metadata(page: str = "", item: str = "", key: str = "") -> JSONResponse:
        check(key)
        found = extra_networks.get_metadata(page, item)
        return JSONResponse({"metadata": json.dumps(found, indent=4, ensure_ascii=False)} if found else {})

    @fastapi_app.get("/sd_extra_networks/get-single-card")
    def get_single_card(page: str = "", tabname: str = "", name: str = "", key: str = "") -> JSONResponse:
        check(key)
        found = next((one for one in extra_pages if one.name == page), None)
        if found is None or tabname not in ("txt2img", "img2img") or name not in found.items:
            return JSONResponse({})
        item = found.create_item(name, enable_filter=False) or found.items[name]
        found.read_user_metadata(item, use_cache=False)
        found.items[name] = item
        return JSONResponse({"html": found.create_item_html(tabname, item)})
