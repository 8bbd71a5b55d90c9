"""The errors that Pillow's readers raise for a damaged file or one that is not a picture; each plugin has its own."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

UNREADABLE: tuple[type[Exception], ...] = (
    OSError,  # also UnidentifiedImageError
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
