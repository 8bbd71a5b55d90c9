"""Deleted pictures lie in `.trash` in the outputs folder, at the path they had, and can be put back. Nothing else is ever touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from backend.unfinished_files import publish_new
from modules.errors import RequestError
from modules.history.reading import PICTURE_SUFFIXES

TRASH = ".trash"
MAX_LISTED = 500
_TEXT_SUFFIX = ".txt"


class Trash:
    """The trash of the outputs folder `root`. Paths are relative to it, with slashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / TRASH

    def delete(self, path: str) -> str:
        """Move a picture, and its text file, into the trash; returns its path there. Raises: RequestError for what is no picture of the folder."""
        source = picture_below(self.root, path)
        target = _move(source, self.folder / source.relative_to(self.root.resolve()))
        text = source.with_suffix(_TEXT_SUFFIX)
        if text.is_file() and not text.is_symlink():
            _move(text, target.with_suffix(_TEXT_SUFFIX))
        return target.relative_to(self.folder).as_posix()

    def restore(self, path: str) -> str:
        """Put a picture back; returns its path, which has a number behind its name if the place is taken. Raises: RequestError."""
        source = picture_below(self.folder, path)
        target = _move(source, self.root / source.relative_to(self.folder.resolve()))
        text = source.with_suffix(_TEXT_SUFFIX)
        if text.is_file() and not text.is_symlink():
            _move(text, target.with_suffix(_TEXT_SUFFIX))
        return target.relative_to(self.root).as_posix()

    def list(self) -> list[str]:
        """Paths of the pictures in the trash, newest first; at most MAX_LISTED."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return []
        found: list[tuple[int, str]] = []
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not (Path(folder) / name).is_symlink()]
            for name in names:
                file = Path(folder) / name
                if file.suffix.lower() in PICTURE_SUFFIXES and not file.is_symlink():
                    found.append((file.stat().st_mtime_ns, file.relative_to(self.folder).as_posix()))
        return [path for _, path in sorted(found, reverse=True)[:MAX_LISTED]]

    def empty(self) -> None:
        """Delete what is in the trash for good. Raises: OSError."""
        if self.folder.is_symlink():
            raise RequestError(f"{TRASH} in the outputs folder is a link; it is not emptied.")
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def picture_below(folder: Path, path: str) -> Path:
    """The picture file at `path` below `folder`. Raises: RequestError for anything else, in the same words whether it exists or not."""
    try:
        found = (folder / path).resolve(strict=True)
        is_inside = found.is_relative_to(folder.resolve()) and not (folder / path).is_symlink()
        if is_inside and found.is_file() and found.suffix.lower() in PICTURE_SUFFIXES:
            return found
    except (OSError, ValueError, RuntimeError):  # not there; a NUL in it; links that lead in a circle
        pass
    raise RequestError(f"{path[-120:]!r} is no picture of this folder any more. Press Refresh.")


def _move(source: Path, target: Path) -> Path:
    """Move a file to `target` or, if that is taken, to the same name with a number. Raises: OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        free = target if number == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
        try:
            publish_new(source, free)
        except FileExistsError:
            continue
        return free
    raise RequestError(f"{target.name}: there are too many files of that name.")
