"""Cards of embeddings: a click inserts the embedding's name into the prompt, or into the negative prompt if that was edited last."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.model_folders import find_files
from modules.ui.extra_networks import ExtraNetworksPage, quote_js

if TYPE_CHECKING:
    from modules.application import Application

SUFFIXES = (".safetensors", ".pt", ".bin")


class ExtraNetworksPageTextualInversion(ExtraNetworksPage):
    """The files in the embedding folders. Which of them fit is known only once a model is loaded."""

    allow_negative_prompt = True

    def __init__(self, app: Application) -> None:
        super().__init__("Textual Inversion")
        self._app = app

    def refresh(self) -> None:
        database = getattr(self._app.models.engine, "embeddings", None)
        if database is not None:
            database.load_textual_inversion_embeddings(force_reload=True)

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        file = self._files().get(name)
        if file is None:
            return None
        path = str(file.with_suffix(""))
        return {
            "name": name,
            "filename": str(file),
            "shorthash": None,
            "preview": self.find_preview(path),
            "description": self.find_description(path),
            "search_terms": [self.search_terms_from_path(str(file))],
            "prompt": quote_js(name),
            "local_preview": f"{path}.preview.png",
            "sort_keys": {"default": index, **self.get_sort_keys(str(file))},
        }

    def list_items(self) -> Iterable[dict[str, Any]]:
        found = (self.create_item(name, index) for index, name in enumerate(self._files()))
        return [item for item in found if item is not None]

    def allowed_directories_for_previews(self) -> list[str]:
        return [str(folder) for folder in self._app.config.embeddings_dirs]

    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for folder in self._app.config.embeddings_dirs:
            for path in find_files(folder, SUFFIXES):
                files.setdefault(path.stem, path.absolute())
        return files
