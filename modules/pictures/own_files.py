"""Which files this program saved: those of this run, and pictures that contain our infotext. Only such files are ever replaced."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from modules.pictures.metadata import read_info_from_image

MAX_REMEMBERED = 100_000

_written: OrderedDict[str, tuple[int, int]] = OrderedDict()
_lock = threading.Lock()


def note_own_file(path: Path) -> None:
    """Remember the current state of a file just written."""
    state = _state_of(path)
    if state is None:
        return
    with _lock:
        _written[str(path.absolute())] = state
        while len(_written) > MAX_REMEMBERED:
            _written.popitem(last=False)


def is_own_file(path: Path) -> bool:
    """Whether this run wrote the file and it is unchanged, or it is a picture with our infotext."""
    return _was_written(path) or _infotext_of(path) is not None


def text_goes_with(picture: Path) -> bool:
    """Whether the text file next to `picture` is ours: written in this run, or identical to the picture's own infotext."""
    text = picture.with_suffix(".txt")
    if _was_written(text):
        return True
    infotext = _infotext_of(picture)
    try:
        return infotext is not None and text.read_text(encoding="utf-8", errors="replace") == f"{infotext}\n"
    except OSError:
        return False


def _was_written(path: Path) -> bool:
    with _lock:
        known = _written.get(str(path.absolute()))
    return known is not None and known == _state_of(path)


def _state_of(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_mtime_ns, stat.st_size


def _infotext_of(path: Path) -> str | None:
    """The picture's infotext; None if there is none or the file is not a picture."""
    try:
        with Image.open(path) as image:
            parameters, items = read_info_from_image(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    told = parameters or items.get("postprocessing")
    return str(told) if told else None
