"""Text in picture files: PNG chunks, EXIF user comments, GIF comments, hidden bits, metadata of other programs.

Reads only; must not know settings.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from PIL import ExifTags, Image

from modules.infotext.foreign import infotext_from_comfy, infotext_from_novelai, infotext_from_novelai_json
from modules.infotext.stealth import read_info_from_image_stealth
from modules.pictures.unreadable import UNREADABLE

_USER_COMMENT = ExifTags.Base.UserComment
_MAKE, _MODEL, _IMAGE_DESCRIPTION = ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.ImageDescription
_UNICODE, _ASCII, _JIS, _UNDEFINED = b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8

IGNORED_INFO_KEYS = frozenset(
    {
        "adobe", "adobe_transform", "background", "chromaticity", "default_image", "dpi", "duration", "exif", "extension", "gamma", "icc_profile",
        "interlace", "jfif", "jfif_density", "jfif_unit", "jfif_version", "loop", "mp", "mpoffset", "photoshop", "progression", "progressive", "srgb",
        "timestamp", "transparency", "version", "xmp",
    }
)  # fmt: skip
"""Fields that Pillow reports but no user wrote."""


def user_comment_exif(text: str) -> bytes:
    """An EXIF block with `text` as user comment, in UTF-16 as in A1111 and Forge."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be", "replace")
    return exif.tobytes()


def decode_user_comment(comment: bytes | str) -> str:
    """The text of an EXIF user comment, whichever Unicode encoding its writer used."""
    if isinstance(comment, str):
        return comment
    prefix, body = comment[:8], comment[8:]
    if prefix == _UNICODE:
        return _decode_utf16(body)
    if prefix == _JIS:
        return body.decode("iso2022_jp", "replace")
    return (body if prefix in (_ASCII, _UNDEFINED) else comment).decode("utf-8", "replace").rstrip("\0")


def _decode_utf16(body: bytes) -> str:
    """Big-endian unless the text indicates otherwise: a byte order mark, or Latin letters whose zero bytes come second."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace")
    if body and body.count(0) == 0 and len(body) % 2:
        return body.decode("utf-8", "replace")
    zeros_first, zeros_second = body[0::2].count(0), body[1::2].count(0)
    return body.decode("utf-16-le" if zeros_second > zeros_first else "utf-16-be", "replace").rstrip("\0")


def read_info_from_image(image: Image.Image) -> tuple[str | None, dict[str, Any]]:
    """(infotext or None, other texts in the file). Checks the `parameters` chunk, the user comment, the comment and hidden bits,
    and converts metadata of NovelAI and ComfyUI. Never raises for a damaged picture."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        image.load()  # chunks may follow the pixels
    items: dict[str, Any] = {str(key): value for key, value in image.info.items()}
    geninfo = items.pop("parameters", None)
    geninfo = _text(geninfo) if geninfo is not None else None
    geninfo = geninfo if geninfo and geninfo.strip("\0 \t\r\n") else None  # an empty chunk must not hide other sources
    exif_texts = _exif_texts(image)
    if geninfo is None and exif_texts.get("UserComment", "").strip():
        geninfo = exif_texts["UserComment"]
        items["exif comment"] = geninfo
    if geninfo is None and items.get("comment"):
        geninfo = _text(items["comment"])
    items = {key: value for key, value in items.items() if key not in IGNORED_INFO_KEYS and not isinstance(value, bytes)}
    foreign = _foreign_infotext(image, items, exif_texts)
    if foreign is not None and (geninfo is None or items.get("Software") == "NovelAI"):
        geninfo = foreign
    if geninfo is None:
        geninfo = _hidden(image)
        geninfo = (infotext_from_novelai_json(geninfo, image.size) or geninfo) if geninfo else None
    return geninfo, items


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _exif_texts(image: Image.Image) -> dict[str, str]:
    try:
        exif = image.getexif()
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT)
        found = {name: exif.get(tag) for name, tag in (("Make", _MAKE), ("Model", _MODEL), ("ImageDescription", _IMAGE_DESCRIPTION))}
    except UNREADABLE:  # a damaged block; a picture without EXIF is what is left
        return {}
    texts = {name: value for name, value in found.items() if isinstance(value, str)}
    if isinstance(comment, (bytes, str)) and comment:
        texts["UserComment"] = decode_user_comment(comment)
    return texts


def _foreign_infotext(image: Image.Image, items: dict[str, Any], exif_texts: dict[str, str]) -> str | None:
    if items.get("Software") == "NovelAI":
        return infotext_from_novelai(str(items.get("Description", "")), str(items.get("Comment", "")), image.size)
    graph = items.get("prompt")
    if not isinstance(graph, str):
        graph = next((text.split(":", 1)[1] for text in exif_texts.values() if text.lower().startswith("prompt:")), None)
    return infotext_from_comfy(graph) if graph else None


def _hidden(image: Image.Image) -> str | None:
    try:
        return read_info_from_image_stealth(image)
    except (OSError, ValueError, SyntaxError):
        return None


def image_data(data: bytes) -> tuple[str, None]:
    """(infotext of the picture or text file `data`, None); an empty text if there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return read_info_from_image(image)[0] or "", None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "", None
    return (text if len(text) < 10_000 else ""), None
