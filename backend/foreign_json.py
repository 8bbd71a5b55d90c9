"""Reads JSON that others wrote, within limits: model headers, metadata, caches, description files next to models.

The result is safe to pass on: it is no deeper than `MAX_DEPTH`, every text can be encoded, and every number fits JSON and 64 bits (other numbers
stay text). Imports no torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 100 * 2**20
"""The safetensors format's limit for a header."""
MAX_DEPTH = 64
MAX_ITEMS = 4_000_000
"""Limit on tables, lists and their entries. A table takes 32 times the memory of the two bytes it is written in."""
_MAX_DIGITS = 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SIDES = re.compile(r"\s*(\d{1,5})\s*(?:[xX]\s*(\d{1,5})\s*)?$")


class ForeignJsonError(ValueError):
    """Not JSON, or too deep or too large; the message says which."""


def parse_json(content: str | bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value in `content`. Raises: ForeignJsonError."""
    if len(content) > max_bytes:
        raise ForeignJsonError(f"it is larger than {max_bytes / 2**20:g} MiB")
    text = content if isinstance(content, str) else _decode(content)
    if text.count(",") + text.count("[") + text.count("{") > MAX_ITEMS:
        raise ForeignJsonError(f"it has more than {MAX_ITEMS:,} entries")
    try:
        value = json.loads(text, parse_float=_float_or_text, parse_int=_int_or_text, parse_constant=str)
    except RecursionError as error:
        raise ForeignJsonError(f"it is nested deeper than {max_depth} levels") from error
    except ValueError as error:
        raise ForeignJsonError(str(error)) from error
    if _is_deeper(value, max_depth):
        raise ForeignJsonError(f"it is nested deeper than {max_depth} levels")
    return value if _is_plain(text) else _with_plain_texts(value)


def read_json_file(path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value in a file. Raises: OSError (FileNotFoundError included) and ForeignJsonError."""
    return parse_json(read_file(path, max_bytes=max_bytes), max_bytes=max_bytes, max_depth=max_depth)


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of a file. Raises: OSError, also if it is not a regular file."""
    with open_file(path) as stream:
        return stream.read(max_bytes + 1)


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading. Raises: OSError, also for a pipe, socket or device, where reading could block forever."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for a writer
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, f"a file cannot have this name ({error})", ascii(str(path))) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {describe_mode(mode)}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def describe_mode(mode: int) -> str:
    """The kind of file, in words."""
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, "a folder"),
    )
    return next((what for test, what in kinds if test(mode)), "a file")


def parse_resolution(value: object) -> tuple[int, int] | None:
    """(width, height) from `modelspec.resolution`: "1024x768", or "512" for both. None for anything else."""
    match = _SIDES.match(str(value)) if isinstance(value, (str, int)) else None
    return (int(match[1]), int(match[2] or match[1])) if match else None


def _decode(content: bytes) -> str:
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ForeignJsonError(f"it is not UTF-8 text: {error}") from error


def _float_or_text(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


def _int_or_text(digits: str) -> int | str:
    number = int(digits) if len(digits) <= _MAX_DIGITS else 2**64
    return number if -(2**63) <= number < 2**63 else digits


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(max_depth):
        level = [child for one in level for child in _children(one) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _is_plain(text: str) -> bool:
    """Whether it cannot contain an unpaired UTF-16 surrogate."""
    if _SURROGATE.search(text):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_plain_texts(value: Any) -> Any:
    """Replace unpaired UTF-16 surrogates, which no encoder accepts, with question marks. The depth has been checked by now."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_with_plain_texts(one) for one in value]
    if isinstance(value, dict):
        return {_with_plain_texts(key): _with_plain_texts(one) for key, one in value.items()}
    return value
