"""A picture to paint on, drawn by javascript/paintCanvas.js with a plain 2D canvas, so that it works without WebGL.

The script keeps a hidden text box filled with JSON: `{"background": path of an uploaded picture or null, "layer": PNG of what is painted, as a data
address, or null}`. On the server the value is that of gradio's image editor: `{"background": picture, "layers": [picture], "composite": None}`.
Must not know what the paint means.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import json
import warnings
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import gradio as gr
from gradio.data_classes import _StaticFiles
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageOps

from modules.pictures.unreadable import UNREADABLE
from modules.ui.components import _ComponentMetaWithoutStub
from modules.ui.page_files import ForeignFileError, uploaded_file

Kind = Literal["mask", "sketch"]
MAX_LAYER_BYTES = 64 << 20
MAX_PIXELS = 100_000_000
_LAYER_BEGIN = "data:image/png;base64,"


class PaintCanvas(gr.Textbox, metaclass=_ComponentMetaWithoutStub):
    """The hidden box; `frame` is what is seen. `upload` takes handlers of a picture that was put in (not of one sent by the server)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loaded: gr.Button | None = None

    def preprocess(self, payload: str | None) -> Any:  # a text box's is a str
        """{"background", "layers", "composite"} as an image editor has it, or None. Raises: gr.Error for a value not of the page's script."""
        if not payload:
            return None
        try:
            value = json.loads(payload)
            path, layer = value.get("background"), value.get("layer")
        except (ValueError, AttributeError, RecursionError) as error:
            raise gr.Error("The painted picture cannot be read. Reload the page.", print_exception=False) from error
        background = None if path is None else _read_background(path)
        layers = [] if layer is None else [_read_layer(layer)]
        return None if background is None and not layers else {"background": background, "layers": layers, "composite": None}

    def postprocess(self, value: Any) -> str | None:
        """`value`: a picture, the path of one, or the value of an image editor (its background is shown). None empties the canvas."""
        picture = value.get("background") if isinstance(value, dict) else value
        if picture is None:
            return None
        path = save_pil_to_cache(picture, cache_dir=self.GRADIO_CACHE, format="png") if isinstance(picture, Image.Image) else str(picture)
        return json.dumps({"background": path, "layer": None, "url": f"gradio_api/file={quote(Path(path).as_posix())}"})

    def upload(self, fn: Any, **kwargs: Any) -> Any:
        assert self.loaded is not None
        return self.loaded.click(fn, **kwargs)

    def get_block_name(self) -> str:
        return "textbox"


def create_paint_canvas(label: str, elem_id: str, *, kind: Kind, color: str, height_px: int) -> PaintCanvas:
    """Build the canvas in the current gradio context: a frame with the id `elem_id`, and the hidden value. `color`: #rrggbb of the brush."""
    frame = (
        f"<div class='paint-frame' data-kind='{kind}' data-color='{html.escape(color)}' data-value='{elem_id}_value' data-loaded='{elem_id}_loaded'"
        f" style='height: {height_px}px' role='group' aria-label='{html.escape(label)}'></div>"
    )
    gr.HTML(frame, elem_id=elem_id, elem_classes=["paint-canvas"], padding=False)
    value = PaintCanvas(visible="hidden", elem_id=f"{elem_id}_value", label=label)
    value.loaded = gr.Button(visible="hidden", elem_id=f"{elem_id}_loaded")
    value.change(fn=None, js=f"(value) => {{ showPaintValue('{elem_id}', value); }}", inputs=[value], show_progress="hidden")
    return value


def _read_background(path: Any) -> Image.Image:
    """Raises: gr.Error for a file that the page does not show, and for one that is no picture."""
    try:
        file = uploaded_file(path, Path(get_upload_folder()), list(_StaticFiles.all_paths))
    except ForeignFileError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return _opened(file, "The picture to paint on")


def _read_layer(layer: Any) -> Image.Image:
    if not isinstance(layer, str) or not layer.startswith(_LAYER_BEGIN) or len(layer) > MAX_LAYER_BYTES:
        raise gr.Error("What was painted is not a picture of the page's canvas, or larger than it may be. Reload the page.", print_exception=False)
    try:
        content = base64.b64decode(layer[len(_LAYER_BEGIN) :], validate=True)
    except binascii.Error as error:
        raise gr.Error("What was painted has arrived damaged. Reload the page.", print_exception=False) from error
    return _opened(io.BytesIO(content), "What was painted", formats=("PNG",))


def _opened(file: Any, what: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    text = f"{what} has {image.width}x{image.height} pixels; {MAX_PIXELS // 10**6} million are possible."
                    raise gr.Error(text, print_exception=False)
                return image.convert("RGBA") if formats else ImageOps.exif_transpose(image)
        except UNREADABLE as error:
            raise gr.Error(f"{what} cannot be read as a picture: {error}", print_exception=False) from error
