"""Values of the canvases: what the page's script sends, what a hostile client sends instead, and what the server shows."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from modules.ui.paint_canvas import PaintCanvas, create_paint_canvas


@pytest.fixture(scope="module")
def canvas() -> PaintCanvas:
    with gr.Blocks():
        return create_paint_canvas("Picture", "here", kind="mask", color="#ffffff", height_px=400)


def layer(size: tuple[int, int] = (8, 6), kind: str = "PNG") -> str:
    content = io.BytesIO()
    Image.new("RGBA" if kind == "PNG" else "RGB", size, "red").save(content, kind)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def uploaded(size: tuple[int, int] = (8, 6), **save: Any) -> str:
    folder = Path(get_upload_folder()) / "test-paint"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "blue").save(folder / "picture.jpg", **save)
    return str(folder / "picture.jpg")


def test_a_value_is_that_of_an_image_editor(canvas: PaintCanvas) -> None:
    value = canvas.preprocess(json.dumps({"background": uploaded(), "layer": layer()}))
    assert value is not None
    assert value["background"].size == value["layers"][0].size == (8, 6)
    assert value["layers"][0].getpixel((1, 1)) == (255, 0, 0, 255)
    assert canvas.preprocess("") is None
    assert canvas.preprocess(json.dumps({"background": None, "layer": None})) is None
    assert canvas.preprocess(json.dumps({"background": uploaded(), "layer": None}))["layers"] == []  # type: ignore[index]


def test_a_turned_photo_is_as_the_browser_shows_it(canvas: PaintCanvas) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    value = canvas.preprocess(json.dumps({"background": uploaded((20, 10), exif=exif.tobytes()), "layer": layer((10, 20))}))
    assert value is not None
    assert value["background"].size == (10, 20)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        "[" * 100_000,
        json.dumps({"background": None, "layer": "data:image/png;base64,////"}),
        json.dumps({"background": None, "layer": "data:image/png;base64,not base64!"}),
        json.dumps({"background": None, "layer": "file:///etc/passwd"}),
        json.dumps({"background": None, "layer": {"path": "x"}}),
        json.dumps({"background": None, "layer": layer(kind="JPEG")}),
    ],
)
def test_what_the_script_never_sends_is_refused(canvas: PaintCanvas, text: str) -> None:
    with pytest.raises(gr.Error):
        canvas.preprocess(text)


@pytest.mark.parametrize("path", ["/etc/hostname", "../../config.json", 7, {"path": "/etc/hostname"}, ""])
def test_only_pictures_of_the_page_are_read(canvas: PaintCanvas, path: Any) -> None:
    with pytest.raises(gr.Error, match="not uploaded"):
        canvas.preprocess(json.dumps({"background": path, "layer": None}))


def test_a_layer_of_too_many_pixels_is_not_decoded(canvas: PaintCanvas) -> None:
    content = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(content, "PNG")
    text = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    with pytest.raises(gr.Error, match="million are possible"):
        canvas.preprocess(json.dumps({"background": None, "layer": text}))


def test_what_the_server_shows_can_be_sent_back(canvas: PaintCanvas) -> None:
    for value in (Image.new("RGB", (5, 4)), uploaded((5, 4)), {"background": Image.new("RGB", (5, 4))}):
        text = canvas.postprocess(value)
        assert text is not None
        assert json.loads(text)["url"].startswith("gradio_api/file=")
        back = canvas.preprocess(text)
        assert back is not None and back["background"].size == (5, 4)
    assert canvas.postprocess(None) is None
