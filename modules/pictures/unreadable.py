"""What Pillow's readers raise for a file that is damaged or no picture: its plugins parse by hand, and say so in their own ways."""

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
