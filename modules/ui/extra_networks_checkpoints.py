"""Cards of checkpoints: clicking one selects it."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.ui.extra_networks import ExtraNetworksPage, quote_js

if TYPE_CHECKING:
    from modules.application import Application


class ExtraNetworksPageCheckpoints(ExtraNetworksPage):
    """The files in the checkpoint folders, by their relative paths."""

    allow_prompt = False

    def __init__(self, app: Application) -> None:
        super().__init__("Checkpoints")
        self._app = app

    def refresh(self) -> None:
        self._app.checkpoints.refresh()

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        info = next((one for one in self._app.checkpoints if one.name == name), None)
        if info is None:
            return None
        path = str(Path(info.filename).with_suffix(""))
        return {
            "name": info.name,
            "filename": info.filename,
            "shorthash": info.shorthash,
            "preview": self.find_preview(path) or self.find_embedded_preview(path, name, info.metadata),
            "description": self.find_description(path),
            "search_terms": [self.search_terms_from_path(info.filename), info.sha256 or ""],
            "onclick": f'"{html.escape(f"selectCheckpoint({quote_js(info.name)})")}"',
            "local_preview": f"{path}.png",
            "metadata": info.metadata,
            "sort_keys": {"default": index, **self.get_sort_keys(info.filename)},
        }

    def list_items(self) -> Iterable[dict[str, Any]]:
        found = (self.create_item(info.name, index) for index, info in enumerate(list(self._app.checkpoints)))
        return [item for item in found if item is not None]

    def allowed_directories_for_previews(self) -> list[str]:
        return [str(folder) for folder in self._app.checkpoints.roots]
