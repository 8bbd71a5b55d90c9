"""Reads a picture's generation parameters, as shown in the PNG Info tab."""

from __future__ import annotations

import html
from typing import Any

from PIL import Image

from modules.pictures.metadata import read_info_from_image


def run_pnginfo(image: Image.Image | None) -> tuple[str, str, str]:
    """("", infotext, HTML of all metadata in the file). Empty strings without a picture."""
    if image is None:
        return "", "", ""
    geninfo, items = read_info_from_image(image)
    shown: dict[str, Any] = {**({"parameters": geninfo} if geninfo else {}), **items}
    if not shown:
        return "", "", "<div><p>Nothing found in the image.</p></div>"
    return "", geninfo or "", "\n".join(_item_html(key, value) for key, value in shown.items())


def _item_html(key: str, value: object) -> str:
    lines = "<br>\n".join(html.escape(line) for line in str(value).split("\n"))
    return f"<div class='infotext'><p><b>{html.escape(str(key))}</b></p><p>{lines}</p></div>"
