"""The HTML of cards of model files. Text from files is escaped, except descriptions if the settings say they are HTML."""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SORTS = {"path": "path", "name": "name", "date_created": "date created", "date_modified": "date modified"}
_FACES = {"path": "Path", "name": "Name", "date_created": "Created", "date_modified": "Modified"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CardSettings:
    """How cards look. Sizes are CSS pixels; 0 means the style sheet decides."""

    width_px: int
    height_px: int
    text_scale: float
    show_description: bool
    description_is_html: bool
    order_field: str
    descending: bool
    show_folders: bool
    folders_as_tree: bool
    folders_width_px: int
    show_hidden_folders: bool
    hidden_models: str

    @classmethod
    def from_options(cls, options: Any) -> CardSettings:
        """Read from the settings."""
        return cls(
            width_px=int(options.extra_networks_card_width),
            height_px=int(options.extra_networks_card_height),
            text_scale=float(options.extra_networks_card_text_scale),
            show_description=bool(options.extra_networks_card_show_desc),
            description_is_html=bool(options.extra_networks_card_description_is_html),
            order_field=str(options.extra_networks_card_order_field).lower().replace(" ", "_"),
            descending=options.extra_networks_card_order == "Descending",
            show_folders=bool(options.extra_networks_tree_view_default_enabled),
            folders_as_tree=options.extra_networks_tree_view_style == "Tree",
            folders_width_px=int(options.extra_networks_tree_view_default_width),
            show_hidden_folders=bool(options.extra_networks_show_hidden_directories),
            hidden_models=str(options.extra_networks_hidden_models),
        )


def is_hidden(folder: str) -> bool:
    """Whether any part of the path starts with a dot."""
    return any(part.startswith(".") for part in folder.split("/"))


def folder_buttons(folders: Iterable[str], settings: CardSettings) -> str:
    """One button per subfolder, and one for all."""
    buttons = ["<button type='button' class='folder selected' data-folder=''>all</button>"]
    for folder in folders:
        if is_hidden(folder) and not settings.show_hidden_folders:
            continue
        depth, face = (folder.count("/"), folder.rpartition("/")[2]) if settings.folders_as_tree else (0, folder)
        indent = f" style='padding-left: {10 + 14 * depth}px'" if depth else ""
        buttons.append(f"<button type='button' class='folder' data-folder='{html.escape(folder)}'{indent}>{html.escape(face)}</button>")
    return "".join(buttons)


def pane_html(id_part: str, tabname: str, page: str, *, cards: str, folders: str, settings: CardSettings, key: str = "") -> str:
    """Controls above folders and cards. `id_part` names tab and page; `key` is the secret that the page sends back to the server."""
    sorts = "".join(
        f"<button type='button' class='sort{' selected' if key == settings.order_field else ''}' id='{id_part}_extra_sort_{key}'"
        f" data-sort='{key}' title='Sort by {words}'>{_FACES[key]}</button>"
        for key, words in SORTS.items()
    )
    direction = "descending" if settings.descending else "ascending"
    width = f" style='flex-basis: {settings.folders_width_px}px'" if settings.folders_width_px else ""
    return (
        f"<div id='{id_part}_pane' class='extra-networks-pane' data-tabname='{tabname}' data-page='{html.escape(page)}'"
        f" data-hidden-models='{settings.hidden_models}' data-key='{html.escape(key)}'>"
        f"<div id='{id_part}_controls' class='extra-networks-controls'>"
        f"<input type='search' id='{id_part}_extra_search' class='extra-search' placeholder='Search' aria-label='Search cards'>"
        f"<span class='sorts'>{sorts}</span>"
        f"<button type='button' class='sort-direction' id='{id_part}_extra_sort_dir' data-direction='{direction}'"
        " title='Reverse the order'></button>"
        f"<button type='button' class='tree-switch{' selected' if settings.show_folders else ''}' id='{id_part}_extra_tree_view'>Folders</button>"
        f"<button type='button' class='refresh tool icon icon-refresh' id='{id_part}_extra_refresh' title='Scan the folders again'></button></div>"
        f"<div class='extra-network-content'>"
        f"<div id='{id_part}_tree' class='extra-network-tree{'' if settings.show_folders else ' hidden-part'}'{width}>"
        f"{folders}</div><div id='{id_part}_cards' class='extra-network-cards'>{cards}</div></div></div>"
    )


def card_html(tabname: str, page: Any, item: dict[str, Any], onclick: str | None, settings: CardSettings) -> str:
    """One card: picture, name, description, and the buttons that appear on hover."""
    name, folder = str(item["name"]), page.folder_of(item)
    hidden = is_hidden(folder)
    if hidden and settings.hidden_models == "Never":
        return ""
    preview = item.get("preview")
    picture = f"<img src='{html.escape(str(preview))}' class='preview' loading='lazy' alt=''>" if preview else _blank(name)
    keys = "".join(f" data-sort-{key}='{html.escape(str(value))}'" for key, value in (item.get("sort_keys") or {}).items())
    sizes = [f"{name}: {px}px" for name, px in (("width", settings.width_px), ("height", settings.height_px)) if px]
    style = "; ".join([*sizes, *([f"font-size: {settings.text_scale * 100:g}%"] if settings.text_scale != 1.0 else [])])
    terms = item.get("search_terms") or []
    searched = " ".join([name, *([terms] if isinstance(terms, str) else map(str, terms))]).lower()
    shown_later = " hidden-part" if hidden and settings.hidden_models == "When searched" else ""
    return (
        f"<div class='card{shown_later}' tabindex='0' role='button' data-name='{html.escape(name)}' data-folder='{html.escape(folder)}'"
        f" data-search='{html.escape(searched)}' data-path='{html.escape(str(item.get('filename') or ''))}'"
        f"{' data-hidden=1' if hidden else ''}{keys} style='{style}'{f' onclick={onclick}' if onclick else ''}>"
        f"{picture}{_buttons(item)}<div class='actions'><span class='name'>{html.escape(name)}</span>{_description(item, settings)}</div></div>"
    )


def _blank(name: str) -> str:
    """In the place of a preview: the beginning of the file's name, on a color of its own."""
    stem = name.replace("\\", "/").rpartition("/")[2]
    hue = zlib.crc32(name.encode("utf-8", "replace")) % 360
    return f"<div class='blank' style='--hue: {hue}' aria-hidden='true'>{html.escape(stem[:2])}</div>"


def _buttons(item: dict[str, Any]) -> str:
    metadata = "<button type='button' class='metadata-button' title='Metadata stored in the file'>i</button>" if item.get("metadata") else ""
    copy = "<button type='button' class='copy-path-button' title='Copy the path of the file'>⧉</button>"
    edit = "<button type='button' class='edit-button' title='Description, preview picture'>✎</button>"
    return f"<div class='card-buttons'>{metadata}{copy}{edit}</div>"


def _description(item: dict[str, Any], settings: CardSettings) -> str:
    text = str(item.get("description") or "") if settings.show_description else ""
    return f"<span class='description'>{text if settings.description_is_html else html.escape(text)}</span>" if text else ""
