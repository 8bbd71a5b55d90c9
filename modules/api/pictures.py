"""Pictures in requests and answers: base64, data URLs, http URLs.

Must not know requests or jobs.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from modules.api import picture_budget
from modules.api.fetching import FetchRules, fetch
from modules.api.limits import MAX_INPUT_PICTURE_PX
from modules.errors import RequestError
from modules.pictures.metadata import read_info_from_image
from modules.pictures.resizing import fix_image
from modules.pictures.unreadable import UNREADABLE
from modules.pictures.writing import EncodeSettings, PictureText, encode_image, kind_that_holds, known_extensions

_DATA_URL = re.compile(r"data:[\w.+-]*(?:/[\w.+-]*)?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "TGA", "JPEG2000")
# not ICO: the contained picture may be larger than the header says
_SHOWN_CHARS = 40
_LIMIT = f"the limit is {MAX_INPUT_PICTURE_PX / 10**6:.1f} megapixels"
_FALLBACK_FORMAT = "png"


class PictureError(RequestError):
    """The data is not a valid picture."""


def decode_picture(text: str, name: str, *, rules: FetchRules | None = None) -> Image.Image:
    """The picture in request field `name`: base64, a data URL, or (with `rules`) an http URL. Rotated upright.

    Raises PictureError or FetchError.
    """
    if text.startswith(("http://", "https://")):
        if rules is None:
            raise PictureError(f"{name}: pictures by URL are disabled (setting api_enable_requests); send it as base64.")
        data = fetch(text, rules)
    else:
        data = _decode_base64(text, name)
    return open_picture(data, name)


def _decode_base64(text: str, name: str) -> bytes:
    if not text.strip():
        raise PictureError(f"{name}: is empty; send a picture as base64.")
    prefix = _DATA_URL.match(text)
    body = "".join(text[prefix.end() :].split() if prefix else text.split())
    body = body.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError(f"{name}: {text[:_SHOWN_CHARS]!r} is not base64; send a picture as base64.") from None


def open_picture(data: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes, decoded and upright; its metadata stays in `.info`. Raises PictureError."""
    try:
        image = Image.open(io.BytesIO(data), formats=_readable_formats())
        if image.width * image.height > MAX_INPUT_PICTURE_PX:
            raise PictureError(f"{name}: a picture of {image.width}x{image.height} px is too large; {_LIMIT}.")
        picture_budget.take(image.width * image.height, name)
        image.load()
        fixed = fix_image(image)
    except RequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"{name}: the picture is too large; {_LIMIT}.") from None
    except UNREADABLE as error:
        raise PictureError(f"{name}: is not a readable picture ({_kind(data)}; {type(error).__name__}).") from None
    assert fixed is not None
    return fixed


def _readable_formats() -> list[str]:
    """Formats to decode: all picture formats, except those that Pillow passes to another program."""
    Image.init()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _kind(data: bytes) -> str:
    return f"{len(data)} bytes starting with {data[:8]!r}"


def fetch_rules(options: Any) -> FetchRules | None:
    """The settings' rules for pictures by URL; None if disabled."""
    if not options.api_enable_requests:
        return None
    return FetchRules(allow_local=not options.api_forbid_local_requests, user_agent=str(options.api_useragent or ""))


def encode_picture(image: Image.Image, *, extension: str, infotext: str | None, settings: EncodeSettings) -> str:
    """`image` encoded as a file of this format with its infotext, in base64."""
    kind = kind_that_holds(image, extension if extension.lower() in known_extensions() else _FALLBACK_FORMAT)
    buffer = io.BytesIO()
    encode_image(image, buffer, kind, PictureText(infotext=infotext), settings)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def encode_settings(options: Any) -> EncodeSettings:
    """The encoding settings. Answers have nothing hidden in their pixels."""
    return EncodeSettings(quality=int(options.jpeg_quality), webp_lossless=bool(options.webp_lossless), write_infotext=bool(options.enable_pnginfo))


def plain_items(items: Mapping[str, Any]) -> dict[str, str]:
    """A picture file's texts in JSON-compatible form."""
    return {str(key): str(value) for key, value in items.items()}


def infotext_of(image: Image.Image) -> str | None:
    """The infotext of an in-memory picture."""
    found = image.info.get("parameters")
    return found if isinstance(found, str) else read_info_from_image(image)[0]
