"""Facts of one picture file: size and infotext, without decoding the picture. Must not know the table."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import ExifTags, Image

from modules.history.index import PictureFacts
from modules.pictures.metadata import decode_user_comment
from modules.pictures.unreadable import UNREADABLE

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif"})
MAX_INFOTEXT_CHARACTERS = 20_000


def read_facts(root: Path, path: str, stat: os.stat_result) -> PictureFacts:
    """The facts of `root / path`. A file that cannot be read as a picture has size 0 x 0 and no infotext, so that it is seen and can be deleted."""
    width, height, infotext = 0, 0, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(root / path) as image:
                width, height = image.size
                infotext = _infotext_of(image)
        except UNREADABLE:
            pass
    text = infotext.replace("\0", "")[:MAX_INFOTEXT_CHARACTERS]
    return PictureFacts(path=path, mtime_ns=stat.st_mtime_ns, num_bytes=stat.st_size, width=width, height=height, infotext=text)


def _infotext_of(image: Image.Image) -> str:
    """What lies before the pixels: the PNG chunk, else the EXIF comment."""
    text = image.info.get("parameters")
    if isinstance(text, str) and text.strip():
        return text
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment) if image.format != "GIF" else image.info.get("comment")
    return decode_user_comment(comment) if isinstance(comment, (bytes, str)) else ""
