"""Which files on this machine a browser may name. A payload contains paths, and nothing proves that the page put them there.

Two kinds are allowed: pictures made by this program (below the outputs folder or in a gallery's temporary folder), and uploaded files.
Links and `..` are resolved before any comparison. Must not know gradio or any tab.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modules.errors import RequestError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif"})
"""Formats that the program writes and browsers show."""

_gallery_folders: set[Path] = set()


class ForeignFileError(RequestError):
    """A browser named a file that this page never gave it."""


def new_gallery_folder(owner: object) -> Path:
    """A temporary folder for pictures that are shown but not saved; deleted together with `owner`."""
    folder = Path(tempfile.mkdtemp(prefix="webui-pictures-")).resolve()
    _gallery_folders.add(folder)
    weakref.finalize(owner, _remove, folder)
    return folder


def _remove(folder: Path) -> None:
    _gallery_folders.discard(folder)
    shutil.rmtree(folder, ignore_errors=True)


def picture_of_page(path: Any, outputs_dir: Path) -> Path:
    """`path` as a picture made by this program. Raises ForeignFileError for anything else; the message does not reveal whether the file exists."""
    found = file_below(path, [outputs_dir, *_gallery_folders])
    if found is None or found.suffix.lower() not in PICTURE_SUFFIXES:
        raise ForeignFileError(
            f"{_shown(path)} is not a picture of this page: it must be below {outputs_dir} or in a gallery. Generate it again or upload it."
        )
    return found


def uploaded_file(path: Any, uploads_dir: Path, shown_dirs: Iterable[Path]) -> Path:
    """`path` as an uploaded file, or as a picture below one of `shown_dirs`. Raises ForeignFileError for anything else."""
    found = file_below(path, [uploads_dir])
    if found is not None:
        return found
    shown = file_below(path, [*shown_dirs, *_gallery_folders])
    if shown is None or shown.suffix.lower() not in PICTURE_SUFFIXES:
        raise ForeignFileError(f"{_shown(path)} was not uploaded to this page and is not a picture it shows. Upload the file.")
    return shown


def file_below(path: Any, folders: Iterable[Path]) -> Path | None:
    """The regular file at `path` if it is below one of `folders`; None otherwise."""
    if not isinstance(path, (str, Path)) or not str(path):
        return None
    try:
        found = Path(path).resolve(strict=True)
        is_below = any(found.is_relative_to(folder.resolve()) for folder in folders)
        return found if is_below and found.is_file() else None
    except (OSError, ValueError, RuntimeError):  # missing file; NUL in the path; circular links
        return None


def pictures_of_page(gallery: Sequence[Any] | None, outputs_dir: Path) -> list[Path]:
    """Every picture of a gallery as sent by the browser. Raises ForeignFileError."""
    return [picture_of_page(_path_of(entry), outputs_dir) for entry in gallery or []]


def _path_of(entry: Any) -> Any:
    return entry[0] if isinstance(entry, (tuple, list)) and entry else entry


def _shown(path: Any) -> str:
    return repr(str(path)[-120:]) if isinstance(path, (str, Path)) else f"A value of type {type(path).__name__}"
