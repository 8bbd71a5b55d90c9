"""Source pictures of img2img: the inner tabs for a picture, a sketch, a mask or a folder, and copying between them.

Must not know how a request is built from them (modules/ui/requests.py), nor the rest of the tab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from modules.jobs.img2img import BATCH_PARAMETERS
from modules.ui.components import FormRow
from modules.ui.paint_canvas import PaintCanvas, create_paint_canvas
from modules.ui.requests import (
    MODE_BATCH,
    MODE_IMG2IMG,
    MODE_INPAINT,
    MODE_INPAINT_SKETCH,
    MODE_INPAINT_UPLOAD,
    MODE_SKETCH,
    MODES_WITH_MASK,
    flat_sketch,
)
from modules.ui.sections import SIDE_STEP_PX

if TYPE_CHECKING:
    from modules.application import Application

PICTURE_HEIGHT_PX = 420
CANVAS_HEIGHT_PX = 500
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
PICTURE: dict[str, Any] = {
    "type": "pil",
    "image_mode": None,  # keep the file's mode: gradio would clip 16-bit values to white
    "format": "png",
    "sources": ["upload", "clipboard"],
    "show_label": False,
    "height": PICTURE_HEIGHT_PX,
}
COPY_TARGETS = (("img2img", "img2img"), ("sketch", "sketch"), ("inpaint", "inpaint"), ("inpaint sketch", "inpaint_sketch"))
"""(button title, name in ids), in the order of the inner tabs."""


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Pictures of a batch: uploaded (`kind` 0) or in a server folder (1); the output folder; parameters taken from each picture."""

    kind: gr.Number
    files: gr.File
    input_dir: gr.Textbox
    output_dir: gr.Textbox
    mask_dir: gr.Textbox
    use_png_info: gr.Checkbox
    png_info_dir: gr.Textbox
    png_info_props: gr.CheckboxGroup

    def inputs(self) -> dict[str, Component]:
        """The controls by their names on the server."""
        return {
            "batch_kind": self.kind,
            "batch_files": self.files,
            "batch_input_dir": self.input_dir,
            "batch_output_dir": self.output_dir,
            "batch_mask_dir": self.mask_dir,
            "batch_use_png_info": self.use_png_info,
            "batch_png_info_props": self.png_info_props,
            "batch_png_info_dir": self.png_info_dir,
        }


@dataclass(frozen=True, kw_only=True)
class PictureSection:
    """Controls for the source picture. `mode` holds the number of the visible inner tab, `tabs` the inner tabs by that number."""

    mode: gr.Number
    init_image: gr.Image
    sketch: PaintCanvas
    inpaint_editor: PaintCanvas
    inpaint_sketch: PaintCanvas
    inpaint_upload_image: gr.Image
    inpaint_upload_mask: gr.Image
    batch: BatchSource
    tabs: tuple[gr.Tab, ...]

    def sources(self) -> list[Component]:
        """Inputs of shown_picture(), in order."""
        return [self.mode, self.init_image, self.sketch, self.inpaint_editor, self.inpaint_sketch, self.inpaint_upload_image]

    def inputs(self) -> dict[str, Component]:
        """The controls by their names on the server."""
        return {
            "mode": self.mode,
            "init_image": self.init_image,
            "sketch": self.sketch,
            "inpaint_editor": self.inpaint_editor,
            "inpaint_sketch": self.inpaint_sketch,
            "inpaint_upload_image": self.inpaint_upload_image,
            "inpaint_upload_mask": self.inpaint_upload_mask,
            **self.batch.inputs(),
        }


def create_pictures(app: Application) -> PictureSection:
    """Build the inner tabs inside the current gradio context."""
    options = app.options
    mode = gr.Number(value=0, precision=0, visible="hidden", elem_id="img2img_selected_tab")
    parts: dict[str, Any] = {}
    copies: dict[str, dict[str, gr.Button]] = {}
    with gr.Tabs(elem_id="mode_img2img"):
        with gr.Tab("img2img", elem_id="img2img_img2img_tab") as plain_tab:
            parts["init_image"] = gr.Image(label="Image for img2img", elem_id="img2img_image", **PICTURE)
            copies["img2img"] = _copy_row("img2img")
        with gr.Tab("Sketch", elem_id="img2img_img2img_sketch_tab") as sketch_tab:
            parts["sketch"] = _sketch("Image for sketch", "img2img_sketch", options.img2img_sketch_default_brush_color)
            copies["sketch"] = _copy_row("sketch")
        with gr.Tab("Inpaint", elem_id="img2img_inpaint_tab") as inpaint_tab:
            parts["inpaint_editor"] = create_paint_canvas(
                "Image for inpainting with mask",
                "img2maskimg",
                kind="mask",
                color=options.img2img_inpaint_mask_brush_color,
                height_px=CANVAS_HEIGHT_PX,
            )
            copies["inpaint"] = _copy_row("inpaint")
        with gr.Tab("Inpaint sketch", elem_id="img2img_inpaint_sketch_tab") as inpaint_sketch_tab:
            color = options.img2img_inpaint_sketch_default_brush_color
            parts["inpaint_sketch"] = _sketch("Image for inpainting what is painted over", "inpaint_sketch", color)
            copies["inpaint_sketch"] = _copy_row("inpaint_sketch")
        with gr.Tab("Inpaint upload", elem_id="img2img_inpaint_upload_tab") as upload_tab, gr.Row():
            labelled = {**PICTURE, "show_label": True, "height": PICTURE_HEIGHT_PX - 80}
            parts["inpaint_upload_image"] = gr.Image(label="Image", elem_id="img_inpaint_base", **labelled)
            parts["inpaint_upload_mask"] = gr.Image(label="Mask", elem_id="img_inpaint_mask", **labelled)
        with gr.Tab("Batch", elem_id="img2img_batch_tab") as batch_tab:
            batch = _create_batch(shows_folders=not app.config.hide_ui_dir_config)
    tabs = (plain_tab, sketch_tab, inpaint_tab, inpaint_sketch_tab, upload_tab, batch_tab)
    section = PictureSection(mode=mode, batch=batch, tabs=tabs, **parts)
    _connect_copies(section, copies)
    return section


def _sketch(label: str, elem_id: str, color: str) -> PaintCanvas:
    return create_paint_canvas(label, elem_id, kind="sketch", color=color, height_px=CANVAS_HEIGHT_PX)


def _copy_row(name: str) -> dict[str, gr.Button]:
    """Buttons that copy the picture of inner tab `name`, keyed by the target tab."""
    with FormRow(elem_id=f"img2img_copy_to_{name}", elem_classes=["copy-row"]):
        gr.HTML("Copy image to:", elem_classes=["copy-label"])
        return {target: gr.Button(title, size="sm", min_width=60) for title, target in COPY_TARGETS if target != name}


def _create_batch(*, shows_folders: bool) -> BatchSource:
    parts: dict[str, Any] = {}
    kind = gr.Number(value=0, precision=0, visible="hidden", elem_id="img2img_batch_source_type")
    with gr.Tabs(elem_id="img2img_batch_source"):
        with gr.Tab("Upload", elem_id="img2img_batch_upload_tab") as upload_tab:
            parts["files"] = gr.File(label="Files", elem_id="img2img_batch_upload", file_count="multiple", file_types=["image"], height=180)
        with gr.Tab("From directory", elem_id="img2img_batch_from_dir_tab", visible=shows_folders) as folder_tab:
            gr.HTML("<p class='scale-preview'>Folders are on the server.</p>")
            parts["input_dir"] = gr.Textbox(label="Input directory", elem_id="img2img_batch_input_dir")
            parts["output_dir"] = gr.Textbox(
                label="Output directory", elem_id="img2img_batch_output_dir", placeholder="Empty: the default img2img folder"
            )
            parts["mask_dir"] = gr.Textbox(
                label="Inpaint batch mask directory",
                elem_id="img2img_batch_inpaint_mask_dir",
                placeholder="Only for inpainting: masks, matched by file name",
            )
    with gr.Accordion("PNG info", open=False):
        parts["use_png_info"] = gr.Checkbox(label="Append png info to prompts", value=False, elem_id="img2img_batch_use_png_info")
        parts["png_info_dir"] = gr.Textbox(
            label="PNG info directory",
            elem_id="img2img_batch_png_info_dir",
            visible=True if shows_folders else "hidden",
            placeholder="Empty: read from each picture",
        )
        parts["png_info_props"] = gr.CheckboxGroup(
            label="Parameters to take from png info", choices=list(BATCH_PARAMETERS), value=[], elem_id="img2img_batch_png_info_props"
        )
    for number, tab in enumerate((upload_tab, folder_tab)):
        tab.select(fn=None, js=f"() => {number}", outputs=[kind], show_progress="hidden")
    return BatchSource(kind=kind, **parts)


def _connect_copies(section: PictureSection, copies: Mapping[str, Mapping[str, gr.Button]]) -> None:
    controls: dict[str, Component] = {
        "img2img": section.init_image,
        "sketch": section.sketch,
        "inpaint": section.inpaint_editor,
        "inpaint_sketch": section.inpaint_sketch,
    }
    for source, buttons in copies.items():
        copied = _copied_sketch if "sketch" in source else _copied_picture
        for target, button in buttons.items():
            # show the tab before setting the picture: a control that was never visible ignores it
            shown = button.click(fn=None, js=f"() => {{ switch_to_{target}(); }}", show_progress="hidden")
            shown.then(copied, inputs=[controls[source]], outputs=[controls[target]], **QUIET)


def _copied_picture(value: Any) -> Any:
    picture = value.get("background") if isinstance(value, dict) else value
    return gr.skip() if picture is None else picture


def _copied_sketch(value: Any) -> Any:
    picture = flat_sketch(value)
    return gr.skip() if picture is None else picture


def connect_mask_controls(section: PictureSection) -> None:
    """Track which inner tab is visible, and show the mask controls where a mask is possible."""
    for number, tab in enumerate(section.tabs):
        shown = "true" if number in MODES_WITH_MASK or number == MODE_BATCH else "false"
        tab.select(fn=None, js=f"() => {{ showPart('inpaint_controls', {shown}); return {number}; }}", outputs=[section.mode], show_progress="hidden")


Editor = Mapping[str, Any] | None


def shown_picture(
    mode: float, init_image: Image.Image | None, sketch: Editor, inpaint_editor: Editor, inpaint_sketch: Editor, upload: Image.Image | None
) -> Image.Image | None:
    """The picture of the visible inner tab; None if it is empty or a batch."""
    editors = {MODE_SKETCH: sketch, MODE_INPAINT: inpaint_editor, MODE_INPAINT_SKETCH: inpaint_sketch}
    number = int(mode)
    if number in editors:
        editor = editors[number]
        return editor.get("background") if editor else None
    return {MODE_IMG2IMG: init_image, MODE_INPAINT_UPLOAD: upload}.get(number)


def size_updates(*sources: Any) -> list[Any]:
    """Width and height of the visible picture, rounded to the sliders' steps; no change if there is none."""
    picture = shown_picture(*sources)
    if picture is None:
        return [gr.skip(), gr.skip()]
    return [gr.update(value=max(64, min(2048, round(side / SIDE_STEP_PX) * SIDE_STEP_PX))) for side in picture.size]


def scale_text(scale: float, *sources: Any) -> str:
    """The size that "Resize by" gives for the visible picture."""
    picture = shown_picture(*sources)
    if picture is None:
        return "The size depends on the picture."
    width, height = (max(8, int(side * scale) // 8 * 8) for side in picture.size)
    return f"resize: from <b>{picture.width}x{picture.height}</b> to <b>{width}x{height}</b>"
