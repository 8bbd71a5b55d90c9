"""The dialog for editing a model file's description, saved as `<stem>.json` next to it. Kinds of models add their own fields."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from modules.application import current_application
from modules.errors import RequestError
from modules.pictures.images import save_image_with_geninfo
from modules.pictures.metadata import read_info_from_image
from modules.prompts import extra_networks
from modules.settings.options import write_text_atomically
from modules.ui.page_files import picture_of_page
from modules.ui.sections import HIDDEN_PART
from modules.ui.shown_text import picture_at

if TYPE_CHECKING:
    from modules.ui.extra_networks import ExtraNetworksPage

log = logging.getLogger(__name__)

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


class UserMetadataEditor:
    """The dialog of one page in one tab. `put_values_into_components` returns a value for each of `components`, in order."""

    def __init__(self, ui: Any, tabname: str, page: ExtraNetworksPage) -> None:
        self.ui = ui
        self.tabname = tabname
        self.page = page
        self.id_part = f"{tabname}_{page.extra_networks_tabname}_edit_user_metadata"
        self.components: list[Any] = []

    # fields

    def create_extra_default_items_in_left_column(self) -> None:
        """Add fields for one kind of model below the description; append them to `components`."""

    def create_default_editor_elems(self) -> None:
        """Name, description, preview picture, and what is known about the file."""
        with gr.Row():
            with gr.Column(scale=2):
                self.edit_name = gr.HTML(elem_id=f"{self.id_part}_title", elem_classes=["extra-network-name"])
                self.edit_description = gr.Textbox(label="Description", lines=4, elem_id=f"{self.id_part}_description")
                self.html_filedata = gr.HTML()
                self.components += [self.edit_name, self.edit_description, self.html_filedata]
                self.create_extra_default_items_in_left_column()
            with gr.Column(scale=1, min_width=160):
                self.html_preview = gr.HTML(elem_classes=["extra-network-preview"])
                self.components.append(self.html_preview)
        self.edit_notes = gr.Textbox(label="Notes", lines=4, elem_id=f"{self.id_part}_notes")
        self.components.append(self.edit_notes)

    def put_values_into_components(self, name: str) -> list[Any]:
        """Values of `components` for the item `name`."""
        item = self.page.items.get(name) or {}
        metadata = self.get_user_metadata(name)
        values = [f"<b>{html.escape(name)}</b>", metadata.get("description", ""), self.file_table(name)]
        picture = f"<img src='{html.escape(str(item['preview']))}' alt=''>" if item.get("preview") else "<p>No preview picture</p>"
        return [*values, *self.extra_values(metadata, item), picture, metadata.get("notes", "")]

    def extra_values(self, metadata: dict[str, Any], item: dict[str, Any]) -> list[Any]:
        """Values of the fields added by create_extra_default_items_in_left_column."""
        return []

    def saved_components(self) -> list[Any]:
        """The fields whose values are passed to `metadata_from`."""
        return [self.edit_description, self.edit_notes]

    def metadata_from(self, description: str, notes: str) -> dict[str, Any]:
        """The metadata to save, from the values of `saved_components`."""
        return {"description": description, "notes": notes}

    # reading metadata

    def get_user_metadata(self, name: str) -> dict[str, Any]:
        """Saved metadata of the item; {} if the item is unknown."""
        item = self.page.items.get(name) or {}
        return extra_networks.get_user_metadata(item["filename"]) if item.get("filename") else {}

    def file_table(self, name: str) -> str:
        rows = "".join(f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in self.get_metadata_table(name))
        return f"<table class='file-metadata'>{rows}</table>"

    def get_metadata_table(self, name: str) -> list[tuple[str, str]]:
        """(label, value) pairs read from the file: path, size, date, hash."""
        item = self.page.items.get(name) or {}
        path = Path(item.get("filename") or "")
        if not path.is_file():
            return [("File", "not found")]
        stat = path.stat()
        shorthash = item.get("shorthash")
        facts = [("File", self.page.search_terms_from_path(str(path)).lstrip("/")), ("Size", f"{stat.st_size / 2**20:.1f} MiB")]
        facts.append(("Modified", datetime.fromtimestamp(stat.st_mtime).strftime("%Y-%m-%d %H:%M")))
        return [*facts, ("Hash", str(shorthash))] if shorthash else facts

    # saving

    def write_user_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        """Save next to the item's file; keys from other programs stay. Raises OSError, also if an existing file there is not such a description."""
        item = self.page.items.get(name)
        if item is None or not item.get("filename"):
            return
        path = Path(item["filename"]).with_suffix(".json")
        kept = {**extra_networks.read_description(path), **metadata}
        write_text_atomically(path, json.dumps(kept, indent=4, ensure_ascii=False))
        self.page.read_user_metadata(item, use_cache=False)

    def save(self, name: str, *values: Any) -> str:
        """Save the fields; returns an HTML line saying what happened."""
        try:
            self.write_user_metadata(name, self.metadata_from(*values))
        except OSError as error:
            log.warning("The description of %s could not be saved: %s", name, error)
            return f"<span class='error'>It could not be saved: {html.escape(str(error))}</span>"
        return "Saved."

    def save_preview(self, name: str, index: float, gallery: Sequence[Any] | None) -> tuple[str, str]:
        """Make picture `index` of the gallery the item's preview. Returns its HTML and a line saying what happened."""
        item, source = self.page.items.get(name) or {}, picture_at(gallery, index)
        if not item.get("local_preview"):
            return "", "This card's file no longer exists."
        if source is None:
            return f"<img src='{html.escape(str(item.get('preview') or ''))}' alt=''>", "Make a picture first: the selected one becomes the preview."
        try:
            with Image.open(picture_of_page(source, current_application().config.outputs_dir)) as image:
                geninfo, _ = read_info_from_image(image)
                save_image_with_geninfo(image, geninfo, item["local_preview"])
        except (OSError, RequestError) as error:
            log.warning("The preview of %s could not be saved: %s", name, error)
            return "", f"<span class='error'>It could not be saved: {html.escape(str(error))}</span>"
        item["preview"] = self.page.link_preview(item["local_preview"])
        return f"<img src='{html.escape(item['preview'])}' alt=''>", "Saved."

    # the dialog

    def create_editor(self) -> None:
        """Build the dialog, hidden. To open it, the page's script writes the name into the hidden field and presses the hidden button."""
        box = f"{self.id_part}_box"
        with gr.Column(elem_id=box, elem_classes=["style-dialog", HIDDEN_PART]), gr.Column(elem_classes=["style-window"]):
            name = gr.Textbox(visible="hidden", elem_id=f"{self.id_part}_name", label="Name")
            open_button = gr.Button(visible="hidden", elem_id=f"{self.id_part}_button")
            self.create_default_editor_elems()
            said = gr.HTML(elem_id=f"{self.id_part}_said")
            with gr.Row():
                preview = gr.Button("Replace preview", elem_id=f"{self.id_part}_replace_preview")
                save = gr.Button("Save", variant="primary", elem_id=f"{self.id_part}_save")
                close = gr.Button("Close", elem_id=f"{self.id_part}_close")
        opened = open_button.click(self.put_values_into_components, inputs=[name], outputs=self.components, **QUIET)
        opened.then(fn=None, js=f"() => {{ showPart('{box}', true); }}", show_progress="hidden")
        close.click(fn=None, js=f"() => {{ showPart('{box}', false); }}", show_progress="hidden")
        self.setup_save_handler(save, self.save, self.saved_components(), name, said)
        index = gr.Number(value=0, visible="hidden")
        inputs = [name, index, self.ui.gallery]
        took = preview.click(
            self.save_preview, js="(name, _, gallery) => [name, selected_gallery_index(), gallery]", inputs=inputs,
            outputs=[self.html_preview, said], **QUIET,
        )  # fmt: skip
        took.then(fn=None, js=self._show_card_js(), inputs=[name], show_progress="hidden")

    def setup_save_handler(self, button: gr.Button, func: Callable[..., Any], components: Sequence[Any], name: Any, said: Any) -> None:
        """Make `button` save the values of `components` and refresh the card."""
        saved = button.click(func, inputs=[name, *components], outputs=[said], **QUIET)
        saved.then(fn=None, js=self._show_card_js(), inputs=[name], show_progress="hidden")

    def _show_card_js(self) -> str:
        page, tabname = json.dumps(self.page.name), json.dumps(self.tabname)
        return f"(name) => {{ extraNetworksRefreshSingleCard({page}, {tabname}, name); }}"
