"""The card tabs next to "Generation" in txt2img and img2img: one per page, filled when first shown.

Must not know any kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.launch.guest_calls import call_guest
from modules.ui import extra_networks
from modules.ui.extra_networks import ExtraNetworksPage
from modules.ui.extra_networks_checkpoints import ExtraNetworksPageCheckpoints
from modules.ui.extra_networks_textual_inversion import ExtraNetworksPageTextualInversion

if TYPE_CHECKING:
    from modules.application import Application

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


@dataclass(frozen=True, kw_only=True)
class ExtraNetworksUi:
    """What a page's editor may use: the tab, its pages, and the gallery whose picture becomes a preview."""

    tabname: str
    gallery: gr.Gallery
    stored_extra_pages: list[ExtraNetworksPage]


def register_default_pages(app: Application) -> None:
    """Register the built-in pages. Call before on_before_ui, where extensions add theirs."""
    extra_networks.initialize()
    extra_networks.register_page(ExtraNetworksPageTextualInversion(app))
    extra_networks.register_page(ExtraNetworksPageCheckpoints(app))


def create_card_tabs(tabname: str, gallery: gr.Gallery) -> None:
    """Add one tab per page to the current gr.Tabs. A page that fails is logged and left out."""
    ui = ExtraNetworksUi(tabname=tabname, gallery=gallery, stored_extra_pages=extra_networks.pages_in_order())
    for page in ui.stored_extra_pages:
        task = f"the {page.title!r} cards could not be built; the page is built without them"
        with gr.Tab(page.title, id=f"{tabname}_{page.extra_networks_tabname}", elem_id=f"{tabname}_{page.extra_networks_tabname}") as tab:
            call_guest(lambda page=page, tab=tab: _create_page(ui, page, tab), task)  # type: ignore[misc]


def _create_page(ui: ExtraNetworksUi, page: ExtraNetworksPage, tab: gr.Tab) -> None:
    id_part = f"{ui.tabname}_{page.extra_networks_tabname}"
    shown = gr.HTML(page.create_html(ui.tabname, empty=True), elem_id=f"{id_part}_cards_html", elem_classes=["extra-networks-html"])
    is_filled = gr.State(False)
    refresh = gr.Button(visible="hidden", elem_id=f"{id_part}_extra_refresh_internal")
    page.create_user_metadata_editor(ui, ui.tabname).create_editor()

    def fill(filled: bool) -> Any:
        return (gr.skip(), True) if filled else (page.create_html(ui.tabname), True)

    def look_again() -> str:
        page.refresh()
        return page.create_html(ui.tabname)

    tab.select(fill, inputs=[is_filled], outputs=[shown, is_filled], **QUIET)
    refresh.click(look_again, outputs=[shown], **QUIET)
