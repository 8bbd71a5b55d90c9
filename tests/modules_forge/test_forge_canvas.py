"""Forge's canvas on gradio's editor: its pictures are components of their own, and neither side talks the other into a circle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from modules_forge.forge_canvas import canvas as module
from modules_forge.forge_canvas.canvas import ForgeCanvas, LogicalImage, base64_to_image, image_to_base64


def test_no_stub_is_written_beside_the_source() -> None:
    assert not Path(module.__file__).with_suffix(".pyi").exists()


def picture(color: tuple[int, ...] = (200, 10, 60, 255)) -> Image.Image:
    return Image.new("RGBA", (6, 4), color)


def test_pictures_pass_through_texts() -> None:
    text = image_to_base64(picture())
    array = base64_to_image(text)
    assert isinstance(array, np.ndarray) and array.shape == (4, 6, 4) and array[0, 0].tolist() == [200, 10, 60, 255]
    assert base64_to_image(image_to_base64(array), numpy=False).tobytes() == picture().tobytes()  # type: ignore[union-attr]
    for unreadable in ("", "hello", "data:image/png;base64,AAAA", "data:image/png;base64,%%%"):
        assert base64_to_image(unreadable) is None


@pytest.fixture
def canvas() -> Any:
    with gr.Blocks():
        yield ForgeCanvas(elem_id="own_canvas", scribble_color="#ff0000", scribble_color_fixed=True, initial_image=picture())


def test_a_canvas_has_two_pictures_and_an_editor(canvas: Any) -> None:
    assert canvas.block.elem_id == canvas.uuid == "own_canvas"
    assert isinstance(canvas.background, LogicalImage) and isinstance(canvas.foreground, gr.Textbox)
    assert canvas.background.preprocess(canvas.background.value).tobytes() == picture().tobytes()
    assert canvas.foreground.preprocess(None) is None
    assert LogicalImage(value="").value == "", "an empty text, as extensions' controls start"
    assert canvas.background.postprocess(np.asarray(picture())) == image_to_base64(picture())
    with gr.Blocks():
        plain = ForgeCanvas(no_upload=True, no_scribbles=True, numpy=True)
    assert plain.block.brush is False or plain.block.brush is None
    assert isinstance(plain.background.preprocess(image_to_base64(picture())), np.ndarray)


def test_what_is_painted_lands_in_the_foreground_and_comes_back_once() -> None:
    clear, red = picture((0, 0, 0, 0)), picture((255, 0, 0, 255))
    background, painted, shown = module._split({"background": picture(), "layers": [clear, red]})
    assert background is not None and painted is not None and painted.tobytes() == red.tobytes()
    assert module._join(background, painted, shown) == (gr.skip(), gr.skip()), "the editor shows that already"
    value, digest = module._join(np.asarray(red), None, shown)
    assert value["background"].tobytes() == red.tobytes() and value["layers"] == []
    assert module._join(red, None, digest) == (gr.skip(), gr.skip())
    assert module._join(None, None, None) == (gr.skip(), gr.skip())
    assert module._split(None)[:2] == (None, None)
