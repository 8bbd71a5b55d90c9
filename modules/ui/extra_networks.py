"""Cards of model files next to the generation controls: `ExtraNetworksPage` (one kind of file) and the list of pages that extensions add to.

A page lists its files as items: dicts whose keys extensions know. This file turns items into cards. The controls around the cards are in
modules/ui/extra_networks_tabs.py, the routes for pictures and metadata in modules/ui/extra_networks_routes.py. Must not know any kind of model.
"""

from __future__ import annotations

import html
import json
import os
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.application import current_application
from modules.prompts import extra_networks
from modules.ui.extra_networks_html import CardSettings, card_html, folder_buttons, pane_html

if TYPE_CHECKING:
    from modules.ui.extra_networks_user_metadata import UserMetadataEditor

PREVIEW_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif")
_INLINE_PICTURES = ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/webp;base64,")

extra_pages: list[ExtraNetworksPage] = []
"""The pages, in the order they were added."""


def register_page(page: ExtraNetworksPage) -> None:
    """Add a page, replacing one with the same title. Extensions call this in on_before_ui."""
    extra_pages[:] = [*(known for known in extra_pages if known.title != page.title), page]


def initialize() -> None:
    """Forget all pages."""
    extra_pages.clear()


def pages_in_order() -> list[ExtraNetworksPage]:
    """All pages; those named in the setting ui_extra_networks_tab_reorder come first."""
    wanted = [name.strip().lower() for name in str(current_application().options.ui_extra_networks_tab_reorder).split(",")]
    return sorted(extra_pages, key=lambda page: wanted.index(page.name) if page.name in wanted else len(wanted))


def plain_path(filename: str | Path) -> Path:
    """The absolute path without `..`. Links are not resolved, because model folders often are links."""
    return Path(os.path.normpath(Path(filename).absolute()))


def quote_js(text: str) -> str:
    """`text` as a JavaScript string literal."""
    return json.dumps(text).replace("</", "<\\/")


class ExtraNetworksPage:
    """One kind of model file. A subclass lists the files; `items` maps names to items once listed.

    Keys of an item: name, filename, shorthash, preview, description, search_terms, local_preview, metadata, sort_keys, prompt and
    negative_prompt (JavaScript expressions), onclick (a quoted attribute value, used instead of prompt), user_metadata, sd_version_str.
    """

    allow_prompt = True
    """Whether a click inserts `prompt` into the prompt."""
    allow_negative_prompt = False
    """Whether the click inserts into the negative prompt if that was edited last."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.name = title.lower()
        self.id_page = self.extra_networks_tabname = self.name.replace(" ", "_")
        self.metadata: dict[str, dict[str, Any]] = {}
        self.items: dict[str, dict[str, Any]] = {}

    # for subclasses to override

    def refresh(self) -> None:
        """Scan the folders again."""

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        """The item with that name; None if it should not be shown."""
        raise NotImplementedError

    def list_items(self) -> Iterable[dict[str, Any]]:
        """All items."""
        raise NotImplementedError

    def allowed_directories_for_previews(self) -> list[str]:
        """The folders of the files; pictures in them may be sent to browsers."""
        return []

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> UserMetadataEditor:
        """The dialog for editing a card's description."""
        from modules.ui.extra_networks_user_metadata import UserMetadataEditor  # it imports this file

        return UserMetadataEditor(ui, tabname, self)

    # helpers for items; `path` is a file path without its suffix

    def read_user_metadata(self, item: dict[str, Any], use_cache: bool = True) -> dict[str, Any]:
        """The user's own metadata for the item, also stored in it as `user_metadata`; a description there replaces the item's."""
        metadata = extra_networks.get_user_metadata(item["filename"]) if item.get("filename") else {}
        item["user_metadata"] = metadata
        if metadata.get("description") is not None:
            item["description"] = metadata["description"]
        return metadata

    def get_sort_keys(self, path: str) -> dict[str, Any]:
        """Sort keys of a card, read from the file."""
        file = Path(path)
        stat = file.stat() if file.is_file() else None
        created = int(getattr(stat, "st_birthtime", stat.st_ctime)) if stat else 0
        return {"date_created": created, "date_modified": int(stat.st_mtime) if stat else 0, "name": file.name.lower(), "path": path.lower()}

    def find_preview(self, path: str) -> str | None:
        """URL of the preview next to a file: `<path>.png`, `<path>.preview.png`, or the same with another picture suffix."""
        found = next((name for suffix in PREVIEW_SUFFIXES for name in (f"{path}{suffix}", f"{path}.preview{suffix}") if Path(name).is_file()), None)
        return None if found is None else self.link_preview(found)

    def link_preview(self, filename: str) -> str:
        """URL of a picture; it changes whenever the file changes."""
        quoted = urllib.parse.quote(filename.replace("\\", "/"), safe="/")
        return f"./sd_extra_networks/thumb?filename={quoted}&mtime={Path(filename).stat().st_mtime}{key_parameter()}"

    def find_embedded_preview(self, path: str, name: str, metadata: dict[str, Any] | None) -> str | None:
        """URL of the picture embedded in a model file (`modelspec.thumbnail`)."""
        inside = (metadata or {}).get("modelspec.thumbnail")
        return inside if isinstance(inside, str) and inside.startswith(_INLINE_PICTURES) else None

    def find_description(self, path: str) -> str | None:
        """The text file next to a model file: `<path>.txt` or `<path>.description.txt`."""
        for file in (Path(f"{path}.txt"), Path(f"{path}.description.txt")):
            if file.is_file():
                return file.read_text(encoding="utf-8", errors="replace")
        return None

    def search_terms_from_path(self, filename: str, possible_directories: Iterable[str] | None = None) -> str:
        """The file's path relative to its folder, with a leading slash."""
        path = plain_path(filename)
        for folder in possible_directories if possible_directories is not None else self.allowed_directories_for_previews():
            if path.is_relative_to(root := plain_path(folder)):
                return f"/{path.relative_to(root).as_posix()}"
        return f"/{path.name}"

    # cards

    def load_items(self) -> None:
        """Rebuild the list of items."""
        listed = [item for item in self.list_items() if item]
        for item in listed:
            if "user_metadata" not in item:
                self.read_user_metadata(item)
        self.items = {item["name"]: item for item in listed}
        self.metadata = {name: item["metadata"] for name, item in self.items.items() if item.get("metadata")}

    def create_html(self, tabname: str, *, empty: bool = False) -> str:
        """Controls, folders and cards for a generation tab; `empty` leaves out the cards."""
        settings = CardSettings.from_options(current_application().options)
        if empty:
            self.items = {}
        else:
            self.load_items()
        cards = "".join(self.create_item_html(tabname, item) for item in self._sorted(settings))
        folders = folder_buttons(self._folders(), settings)
        where = " or ".join(f"<code>{html.escape(folder)}</code>" for folder in self.allowed_directories_for_previews())
        nothing = f"<p class='nothing'>There are no files. Put them into {where} and press the refresh button.</p>" if not empty and where else ""
        return pane_html(
            f"{tabname}_{self.extra_networks_tabname}", tabname, self.name, cards=cards or nothing, folders=folders, settings=settings, key=_key
        )

    def create_item_html(self, tabname: str, item: dict[str, Any]) -> str:
        """The HTML of one card."""
        settings = CardSettings.from_options(current_application().options)
        onclick = item.get("onclick")
        if onclick is None and self.allow_prompt and item.get("prompt"):
            negative = item.get("negative_prompt") or '""'
            call = f"cardClicked('{tabname}', {item['prompt']}, {negative}, {'true' if self.allow_negative_prompt else 'false'})"
            onclick = f'"{html.escape(call)}"'
        return card_html(tabname, self, item, onclick, settings)

    def folder_of(self, item: dict[str, Any]) -> str:
        """The item's folder relative to the page's, with slashes; empty for the page's own folder."""
        return self.search_terms_from_path(item.get("filename") or "").rpartition("/")[0].strip("/")

    def _folders(self) -> list[str]:
        found: set[str] = set()
        for item in self.items.values():
            parts = self.folder_of(item).split("/")
            found |= {"/".join(parts[: count + 1]) for count in range(len(parts))}
        return sorted(found - {""}, key=str.lower)

    def _sorted(self, settings: CardSettings) -> Iterator[dict[str, Any]]:
        def key(item: dict[str, Any]) -> tuple[bool, Any]:
            value = (item.get("sort_keys") or {}).get(settings.order_field, "")
            return isinstance(value, str), value

        yield from sorted(self.items.values(), key=key, reverse=settings.descending)


_key = ""


def ask_for_key(key: str) -> None:
    """From now on, send pictures and metadata only to clients that know `key`. It is part of the page, which may be behind a password."""
    global _key  # noqa: PLW0603 - pages, which extensions make, have no other way to it
    _key = key


def key_parameter() -> str:
    return f"&key={_key}" if _key else ""


def key_is_right(key: str) -> bool:
    return not _key or key == _key


# names that extensions call


def get_metadata(page: str = "", item: str = "") -> dict[str, Any]:
    """The metadata stored in an item's file."""
    found = next((one for one in extra_pages if one.name == page), None)
    return {} if found is None else found.metadata.get(item, {})
