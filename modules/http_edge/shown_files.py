"""Which files of the outputs folder a browser may name in a URL: pictures. Captions, settings and whatever else lies there are no one's to read.

Must not know routes other than the two forms in which the page's library serves files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif"})
_FILE_ROUTE = re.compile(r"(?:/gradio_api)?/file[=/](.*)", re.DOTALL)


def names_no_picture(path: str, outputs_dir: Path, allowed: Sequence[str] = ()) -> bool:
    """Whether a URL's path asks for a file below the outputs folder that is no picture. `allowed`: folders that the operator opened as a whole."""
    route = _FILE_ROUTE.fullmatch(path)
    if route is None:
        return False
    named = Path(route[1])
    file = named.resolve()
    if not file.is_relative_to(outputs_dir.resolve()) or any(file.is_relative_to(Path(folder).resolve()) for folder in allowed):
        return False
    return not {named.suffix.lower(), file.suffix.lower()} <= PICTURE_SUFFIXES
