"""Parts that more than one tab uses: the refresh button, the result panel with its gallery and buttons; and the names that extensions import.

Must not know how a picture is made, nor any particular tab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.ui import symbols
from modules.ui.components import ToolButton
from modules.ui.saving import save_files
from modules.ui.shown_text import error_html, infotext_of, picture_at, plaintext_to_html, read_generation_info, update_generation_info

__all__ = [
    "OutputPanel",
    "create_output_panel",
    "create_refresh_button",
    "error_html",
    "infotext_of",
    "picture_at",
    "plaintext_to_html",
    "read_generation_info",
    "save_files",
    "update_generation_info",
]


def __getattr__(name: str) -> Any:
    """The faces of tool buttons, which extensions import from here."""
    if name.endswith("_symbol") and hasattr(symbols, name):
        return getattr(symbols, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create_refresh_button(
    refresh_component: gr.blocks.Block | Sequence[gr.blocks.Block],
    refresh_method: Callable[[], object],
    refreshed_args: dict[str, Any] | Callable[[], dict[str, Any]] | None,
    elem_id: str,
) -> ToolButton:
    """A button that runs `refresh_method`, then updates `refresh_component` with the properties from `refreshed_args`."""
    components: list[Any] = list(refresh_component) if isinstance(refresh_component, (list, tuple)) else [refresh_component]

    def refresh() -> Any:
        refresh_method()
        args = refreshed_args() if callable(refreshed_args) else refreshed_args or {}
        updates = [gr.update(**args) for _ in components]
        return updates if len(updates) > 1 else updates[0]

    button = ToolButton(icon_name="refresh", elem_id=elem_id, elem_classes=["refresh-button"])
    button.click(fn=refresh, inputs=[], outputs=components, show_progress="hidden", queue=False, api_visibility="private")
    return button


@dataclass(frozen=True, kw_only=True)
class OutputPanel:
    """The right side of a tab. `buttons` are the ones under the gallery: open_folder, save, zip, img2img, inpaint, extras; upscale in txt2img."""

    gallery: gr.Gallery
    generation_info: gr.Textbox
    infotext: gr.HTML
    html_log: gr.HTML
    download_files: gr.File
    buttons: dict[str, ToolButton]


def _panel_buttons(tab: str, *, show_folder_button: bool) -> dict[str, ToolButton]:
    with gr.Row(elem_id=f"image_buttons_{tab}", elem_classes=["image-buttons"]):
        buttons = {
            "open_folder": ToolButton(icon_name="folder", elem_id=f"{tab}_open_folder", visible=show_folder_button),
            "save": ToolButton(icon_name="save", elem_id=f"save_{tab}"),
            "zip": ToolButton(icon_name="zip", elem_id=f"save_zip_{tab}"),
            "img2img": ToolButton(icon_name="picture", elem_id=f"{tab}_send_to_img2img"),
            "inpaint": ToolButton(icon_name="brush", elem_id=f"{tab}_send_to_inpaint"),
        }
        if tab != "extras":
            buttons["extras"] = ToolButton(icon_name="extras", elem_id=f"{tab}_send_to_extras")
        if tab == "txt2img":
            buttons["upscale"] = ToolButton(icon_name="upscale", elem_id="txt2img_upscale")
    return buttons


def create_output_panel(tabname: str, *, show_folder_button: bool = False, gallery_height: str = "") -> OutputPanel:
    """Build the result panel of the tab `tabname`; `gallery_height` is CSS, empty for the default."""
    with (
        gr.Column(elem_id=f"{tabname}_results", elem_classes=["results"]),
        gr.Column(elem_id=f"{tabname}_results_panel", elem_classes=["results-panel"]),
    ):
        with gr.Column(elem_id=f"{tabname}_gallery_container", elem_classes=["gallery-container-box"]):
            gallery = gr.Gallery(
                label="Output",
                show_label=False,
                elem_id=f"{tabname}_gallery",
                elem_classes=["output-gallery"],
                columns=4,
                preview=True,
                height=gallery_height or None,
                interactive=False,
                object_fit="contain",
                buttons=["download", "fullscreen"],
            )
        buttons = _panel_buttons(tabname, show_folder_button=show_folder_button)
        download_files = gr.File(
            label="Saved files", show_label=False, visible=False, interactive=False, file_count="multiple", elem_id=f"download_files_{tabname}"
        )
        infotext = gr.HTML(elem_id=f"html_info_{tabname}", elem_classes=["infotext-box"])
        html_log = gr.HTML(elem_id=f"html_log_{tabname}", elem_classes=["html-log"])
        generation_info = gr.Textbox(visible="hidden", elem_id=f"generation_info_{tabname}")
        _connect_selection(tabname, gallery, generation_info, infotext)
    return OutputPanel(
        gallery=gallery, generation_info=generation_info, infotext=infotext, html_log=html_log, download_files=download_files, buttons=buttons
    )


def _connect_selection(tab: str, gallery: gr.Gallery, generation_info: gr.Textbox, infotext: gr.HTML) -> None:
    """Show the parameters of the selected picture: on a click, and through the hidden button that extensions' scripts press."""

    def on_select(info: str, shown: str, event: gr.SelectData) -> str:
        return update_generation_info(info, shown, event.index if isinstance(event.index, int) else 0)

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    gallery.select(on_select, inputs=[generation_info, infotext], outputs=[infotext], **quiet)
    button = gr.Button(visible="hidden", elem_id=f"{tab}_generation_info_button")
    index = gr.Number(value=0, visible="hidden", elem_id=f"{tab}_selected_index")
    button.click(
        update_generation_info,
        js="(info, shown, index) => [info, shown, selected_gallery_index()]",
        inputs=[generation_info, infotext, index],
        outputs=[infotext],
        **quiet,
    )
