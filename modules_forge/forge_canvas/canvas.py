"""`ForgeCanvas`: a picture to paint on, with the attributes that extensions use, made of gradio's image editor.

`background` and `foreground` are components of their own, hidden texts that hold a picture each: inputs and outputs of an extension's events. They
follow what is painted, and what an event puts into them is shown.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import inspect
import io
from abc import ABCMeta
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from gradio.component_meta import ComponentMeta, updateable
from PIL import Image, UnidentifiedImageError

Picture = Image.Image | np.ndarray
_QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
_HEAD = "data:image/png;base64,"


def image_to_base64(image_array: Picture, numpy: bool = True) -> str:
    """A picture as a data URL (PNG). `numpy` is there for callers; the kind of picture tells by itself."""
    image = Image.fromarray(image_array) if isinstance(image_array, np.ndarray) else image_array
    file = io.BytesIO()
    image.convert("RGBA").save(file, format="PNG", compress_level=1)
    return _HEAD + base64.b64encode(file.getvalue()).decode("ascii")


def base64_to_image(base64_str: str, numpy: bool = True) -> Picture | None:
    """The picture (RGBA) in a data URL, as an array with `numpy`; None for an empty or unreadable text."""
    if not base64_str or not base64_str.startswith("data:image/"):
        return None
    try:
        data = base64.b64decode(base64_str.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGBA")
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    return np.asarray(image) if numpy else image


class _WithoutStub(ComponentMeta):
    """gradio's metaclass, but without the .pyi file that gradio writes next to a component's source."""

    def __new__(mcs, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        attrs["__init__"] = updateable(attrs["__init__"])
        attrs["__init__"].__signature__ = inspect.signature(bases[0].__init__)  # type: ignore[misc]
        return ABCMeta.__new__(mcs, name, bases, attrs)


class LogicalImage(gr.Textbox, metaclass=_WithoutStub):
    """A hidden text with a picture in it: events get the picture (an array with `numpy`, else PIL), and may return either, or None."""

    def __init__(self, *args: Any, numpy: bool = True, **kwargs: Any) -> None:
        self.numpy = numpy
        if kwargs.get("value") is not None:
            kwargs["value"] = self.postprocess(kwargs["value"])
        super().__init__(*args, **kwargs)

    def preprocess(self, payload: str | None) -> Any:
        return base64_to_image(payload or "", self.numpy)

    def postprocess(self, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        return image_to_base64(value)

    def get_block_name(self) -> str:
        return "textbox"


class ForgeCanvas:
    """`block` is what is seen. Colors are `#rrggbb`; `contrast_scribbles` paints white, to be seen on any picture."""

    def __init__(
        self,
        no_upload: bool = False,
        no_scribbles: bool = False,
        contrast_scribbles: bool = False,
        height: int = 512,
        scribble_color: str = "#000000",
        scribble_color_fixed: bool = False,
        scribble_width: int = 4,
        scribble_width_fixed: bool = False,
        scribble_alpha: int = 100,
        scribble_alpha_fixed: bool = False,
        scribble_softness: int = 0,
        scribble_softness_fixed: bool = False,
        visible: bool = True,
        numpy: bool = False,
        initial_image: Any = None,
        elem_id: str | None = None,
        elem_classes: Sequence[str] | str | None = None,
    ) -> None:
        color = "#ffffff" if contrast_scribbles else scribble_color
        self.uuid = elem_id or f"painted-{id(self):x}"
        self.block = gr.ImageEditor(
            value=initial_image,
            show_label=False,
            elem_id=self.uuid,
            elem_classes=elem_classes if elem_classes is None or isinstance(elem_classes, str) else list(elem_classes),
            type="pil",
            image_mode="RGBA",
            format="png",
            sources=() if no_upload else ("upload", "clipboard"),
            transforms=(),
            layers=False,
            height=height,
            visible=visible,
            brush=False
            if no_scribbles
            else gr.Brush(
                default_size=scribble_width,
                colors=[color] if scribble_color_fixed or contrast_scribbles else None,
                default_color=color,
                color_mode="fixed" if scribble_color_fixed or contrast_scribbles else "defaults",
            ),
            eraser=False if no_scribbles else None,
        )
        hidden: dict[str, Any] = {"visible": "hidden", "numpy": numpy}
        self.foreground = LogicalImage(label="foreground", elem_id=f"{self.uuid}_foreground", elem_classes=["logical_image_foreground"], **hidden)
        self.background = LogicalImage(
            label="background", value=initial_image, elem_id=f"{self.uuid}_background", elem_classes=["logical_image_background"], **hidden
        )
        self._shown = gr.State(None)
        painted = [self.background, self.foreground, self._shown]
        for event in (self.block.input, self.block.upload, self.block.clear):
            event(_split, inputs=[self.block], outputs=painted, **_QUIET)
        for box in (self.background, self.foreground):
            box.change(_join, inputs=[self.background, self.foreground, self._shown], outputs=[self.block, self._shown], **_QUIET)


def _split(value: Any) -> tuple[Image.Image | None, Image.Image | None, str]:
    """(background, what is painted on it, what tells them apart from others) of the editor's value."""
    background, painted = (value or {}).get("background"), None
    for layer in (value or {}).get("layers") or ():
        painted = layer if painted is None else Image.alpha_composite(painted, layer)
    return background, painted, _digest(background, painted)


def _join(background: Picture | None, painted: Picture | None, shown: str | None) -> tuple[Any, Any]:
    """The editor's value for two pictures; no change if they are those that it shows."""
    pictures = [Image.fromarray(one) if isinstance(one, np.ndarray) else one for one in (background, painted)]
    digest = _digest(*pictures)
    if digest == shown or (shown is None and pictures == [None, None]):
        return gr.skip(), gr.skip()
    layers = [] if pictures[1] is None else [pictures[1]]
    return {"background": pictures[0], "layers": layers, "composite": None}, digest


def _digest(*pictures: Image.Image | None) -> str:
    """Equal for equal pixels."""
    parts = [b"" if one is None else str(one.size).encode() + one.convert("RGBA").tobytes() for one in pictures]
    return hashlib.sha256(b"|".join(parts)).hexdigest()
