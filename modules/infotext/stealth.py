"""Hides infotext in the lowest bits of a picture's pixels, where it survives programs that drop metadata.

Layout (defined by sd_webui_stealth_pnginfo): bits run column by column, either one bit per pixel in alpha, or three in red, green, blue.
    signature (15 ASCII bytes) | payload length in bits (32, big-endian) | payload: UTF-8, or gzip of it
Signatures: stealth_pnginfo, stealth_pngcomp (alpha; plain, gzip), stealth_rgbinfo, stealth_rgbcomp. Must not know settings.
"""

from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
from PIL import Image

_SIGNATURE_BYTES = 15
_HEADER_BITS = (_SIGNATURE_BYTES + 4) * 8
_ALPHA_SIGNATURES = {b"stealth_pnginfo": False, b"stealth_pngcomp": True}
_RGB_SIGNATURES = {b"stealth_rgbinfo": False, b"stealth_rgbcomp": True}
_MAX_TEXT_BYTES = 16 << 20
"""Maximum unpacked length, so that a crafted picture cannot fill the memory."""


def read_info_from_image_stealth(image: Image.Image) -> str | None:
    """The text hidden in `image`, or None. Never raises for a picture without hidden text."""
    if image.mode == "RGBA":
        found = _read(_alpha_bits(image), _ALPHA_SIGNATURES)
        if found is not None:
            return found
    if image.mode in ("RGB", "RGBA"):
        return _read(_rgb_bits(image), _RGB_SIGNATURES)
    return None


def add_stealth_infotext(image: Image.Image, text: str, mode: str = "Alpha") -> Image.Image:
    """A copy of `image` with `text` in its alpha channel ("Alpha", an RGBA copy) or its colors ("RGB").

    Raises ValueError if the picture has too few pixels for the text.
    """
    if mode not in ("Alpha", "RGB"):
        raise ValueError(f"stealth infotext mode {mode!r} is unknown. Use Alpha or RGB.")
    signature = b"stealth_pngcomp" if mode == "Alpha" else b"stealth_rgbcomp"
    payload = gzip.compress(text.encode("utf-8", "replace"), mtime=0)
    message = signature + (len(payload) * 8).to_bytes(4, "big") + payload
    bits = np.unpackbits(np.frombuffer(message, dtype=np.uint8))
    pixels = np.array(image.convert("RGBA" if mode == "Alpha" or image.mode == "RGBA" else "RGB"))
    channels = slice(3, 4) if mode == "Alpha" else slice(0, 3)
    plane = pixels[:, :, channels].transpose(1, 0, 2).reshape(-1)
    if bits.size > plane.size:
        raise ValueError(f"a text of {bits.size} bits does not fit into the {plane.size} bits of a {image.width}x{image.height} picture.")
    plane[: bits.size] = (plane[: bits.size] & 0xFE) | bits
    pixels[:, :, channels] = plane.reshape(image.width, image.height, -1).transpose(1, 0, 2)
    return Image.fromarray(pixels)


def _alpha_bits(image: Image.Image) -> np.ndarray:
    return (np.asarray(image.getchannel("A")).T & 1).reshape(-1)


def _rgb_bits(image: Image.Image) -> np.ndarray:
    return (np.asarray(image.convert("RGB")).transpose(1, 0, 2) & 1).reshape(-1)


def _read(bits: np.ndarray, signatures: dict[bytes, bool]) -> str | None:
    if bits.size < _HEADER_BITS:
        return None
    header = np.packbits(bits[:_HEADER_BITS]).tobytes()
    compressed = signatures.get(header[:_SIGNATURE_BYTES])
    if compressed is None:
        return None
    num_bits = int.from_bytes(header[_SIGNATURE_BYTES:], "big")
    if num_bits > bits.size - _HEADER_BITS:
        return None
    payload = np.packbits(bits[_HEADER_BITS : _HEADER_BITS + num_bits]).tobytes()
    try:
        return (_gunzip(payload) if compressed else payload).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None


def _gunzip(payload: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as stream:
        text = stream.read(_MAX_TEXT_BYTES + 1)
    if len(text) > _MAX_TEXT_BYTES:
        raise OSError("stealth infotext unpacks to more than an infotext can be")
    return text
