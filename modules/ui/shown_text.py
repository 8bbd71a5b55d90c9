"""Text as HTML, and a gallery's data: the file and the parameters of a picture. Must not know controls."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any


def plaintext_to_html(text: str, classname: str | None = None) -> str:
    """`text` as one HTML paragraph: special characters escaped, line breaks kept."""
    lines = "<br>\n".join(html.escape(line) for line in text.split("\n"))
    return f"<p class='{html.escape(classname, quote=True)}'>{lines}</p>" if classname else f"<p>{lines}</p>"


def error_html(message: str) -> str:
    """An error message as HTML, for the log under the gallery."""
    return f"<div class='error'>{plaintext_to_html(message)}</div>"


def read_generation_info(generation_info: str) -> dict[str, Any]:
    """The generation info JSON of a gallery as a dict; empty if there is none or it is broken."""
    try:
        info = json.loads(generation_info or "{}")
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def infotext_of(generation_info: str, picture_index: int) -> str:
    """Infotext of picture `picture_index` in the gallery. Falls back to the first picture if the index does not exist, and to "" if there is none."""
    infotexts = read_generation_info(generation_info).get("infotexts")
    if not isinstance(infotexts, list) or not infotexts:
        return ""
    return str(infotexts[picture_index] if 0 <= picture_index < len(infotexts) else infotexts[0])


def picture_at(gallery: Sequence[Any] | None, picture_index: float) -> str | None:
    """File of picture `picture_index` in the gallery (the first if the index does not exist); None for an empty gallery."""
    if not gallery:
        return None
    index = int(picture_index)
    entry = gallery[index if 0 <= index < len(gallery) else 0]
    return str(entry[0] if isinstance(entry, (tuple, list)) else entry)


def update_generation_info(generation_info: str, html_info: str, img_index: float) -> str:
    """The HTML to show under the gallery when picture `img_index` is selected; `html_info` if its parameters are unknown."""
    text = infotext_of(generation_info, int(img_index))
    return plaintext_to_html(text, "infotext") if text else html_info
