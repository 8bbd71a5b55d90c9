"""File listings under the names that extensions import, from here and from `modules.shared`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from backend.model_folders import find_files
from modules.app_config import SCRIPT_DIR

_MAX_DIGITS = 4000
"""More digits than Python converts to a number."""


def natural_sort_key(s: str, regex: Any = re.compile("([0-9]+)")) -> list[int | str]:
    """Sort key that orders numbers in a text by value."""
    return [int(text[:_MAX_DIGITS]) if text.isascii() and text.isdigit() else text.lower() for text in regex.split(s)]


def listfiles(dirname: str | os.PathLike[str]) -> list[str]:
    """Full paths of the files in a folder in natural order, without hidden ones; [] for a missing folder."""
    try:
        names = sorted((entry.name for entry in os.scandir(dirname) if entry.is_file()), key=natural_sort_key)
    except FileNotFoundError:
        return []
    return [os.path.join(dirname, name) for name in names if not name.startswith(".")]  # noqa: PTH118 - strings in, strings out


def walk_files(path: str | os.PathLike[str], allowed_extensions: Iterable[str] | None = None) -> Iterator[str]:
    """Full paths of the files under a folder in natural order, including linked folders."""
    allowed = None if allowed_extensions is None else [extension.lower() for extension in allowed_extensions]
    yield from (str(path) for path in find_files(Path(path), allowed))


def html_path(filename: str) -> str:
    return str(SCRIPT_DIR / "html" / filename)


def html(filename: str) -> str:
    """The text of a file in html/; empty if it does not exist."""
    path = Path(html_path(filename))
    return path.read_text(encoding="utf8") if path.is_file() else ""
