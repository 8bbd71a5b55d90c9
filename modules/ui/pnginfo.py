"""The PNG Info tab: the parameters stored in a picture, and buttons that send it to other tabs.

Must not know the other tabs; modules/ui/tabs.py connects the buttons.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

import gradio as gr
from PIL import Image, UnidentifiedImageError

from modules.pictures.images import read_info_from_image
from modules.ui.shown_text import plaintext_to_html


@dataclass(frozen=True, kw_only=True)
class PngInfoTab:
    """`text` holds the parameters as found in the file; the buttons are keyed by their target tab."""

    image: gr.Image
    text: gr.Textbox
    details: gr.HTML
    to_txt2img: gr.Button
    to_img2img: gr.Button
    to_inpaint: gr.Button
    to_extras: gr.Button


def create_pnginfo_tab() -> PngInfoTab:
    """Build the tab inside the current gradio context."""
    with gr.Row(equal_height=False, elem_classes=["generation-columns"]):
        with gr.Column():
            # the uploaded file itself: a conversion would lose the metadata
            image = gr.Image(
                label="Source", elem_id="pnginfo_image", sources=["upload"], type="filepath", image_mode=None, height=560, interactive=True
            )
        with gr.Column():
            text = gr.Textbox(label="Parameters", elem_id="pnginfo_generation_info", lines=8, max_lines=30, interactive=False, buttons=["copy"])
            with gr.Row(elem_id="pnginfo_buttons"):
                to_txt2img = gr.Button("Send to txt2img", elem_id="txt2img_tab")
                to_img2img = gr.Button("Send to img2img", elem_id="img2img_tab")
                to_inpaint = gr.Button("Send to inpaint", elem_id="inpaint_tab")
                to_extras = gr.Button("Send to extras", elem_id="extras_tab")
            details = gr.HTML(elem_id="pnginfo_html_info")
    image.change(read_picture, inputs=[image], outputs=[text, details], show_progress="hidden", api_visibility="private")
    buttons = {"to_txt2img": to_txt2img, "to_img2img": to_img2img, "to_inpaint": to_inpaint, "to_extras": to_extras}
    return PngInfoTab(image=image, text=text, details=details, **buttons)


def read_picture(path: str | None) -> tuple[str, str]:
    """The parameters in the picture file, and all of its metadata, as HTML."""
    if not path:
        return "", ""
    try:
        with Image.open(path) as image:
            parameters, items = read_info_from_image(image)
    except (OSError, UnidentifiedImageError) as error:
        return "", f"<div class='html-log'><div class='error'>{plaintext_to_html(f'This file cannot be read as a picture: {error}')}</div></div>"
    shown = {"parameters": parameters, **items} if parameters else dict(items)
    if not shown:
        return "", "<p>This picture contains no text: it was made by another program, or its text was removed.</p>"
    blocks = [f"<h4>{html.escape(str(key))}</h4>{plaintext_to_html(str(value), 'infotext')}" for key, value in shown.items() if key != "parameters"]
    return parameters or "", f"<div class='pnginfo-details'>{''.join(blocks)}</div>"
