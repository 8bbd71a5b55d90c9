"""Lists the files under a folder: every list of models, embeddings and pictures is made here.

Linked folders are followed, each real folder once. Unusable entries are skipped and named in the log once: a pipe or device, which would block
its reader; a broken link; a name that is not UTF-8, which neither JSON nor the page can represent. Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from backend.foreign_json import describe_mode

logger = logging.getLogger(__name__)

_DIGITS = re.compile("([0-9]+)")


def find_files(root: Path, suffixes: Collection[str] | None = None) -> list[Path]:
    """Files under `root` with one of the suffixes (lower case, with the dot; None: all), in natural order. Empty for a missing folder."""
    wanted = None if suffixes is None else tuple(suffixes)
    return sorted(_walk(Path(root), wanted), key=lambda path: natural_key(path.as_posix()))


def natural_key(text: str) -> list[tuple[bool, int, str]]:
    """A sort key that orders numbers in a text by value: "beta 9" before "beta 10"."""
    parts = _DIGITS.split(text)  # every other one is a number; numbers of one length sort as texts
    return [(False, len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (True, 0, part.lower()) for place, part in enumerate(parts)]


def _walk(root: Path, suffixes: tuple[str, ...] | None) -> Iterator[Path]:
    """Real folders before linked ones, so that a file that is reachable both ways keeps its real name."""
    seen: set[str] = set()
    pending: list[str] = [str(root)]
    linked: list[str] = []
    while pending or linked:
        folder = pending.pop() if pending else linked.pop(0)
        if (real := _real(folder)) in seen:
            continue
        seen.add(real)
        for entry in _scan(folder, is_root=folder == str(root)):
            if _is_folder(entry):
                (linked if entry.is_symlink() else pending).append(entry.path)
            elif (suffixes is None or entry.name.lower().endswith(suffixes)) and _is_usable(entry):
                yield Path(entry.path)


def _scan(folder: str, *, is_root: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        if not is_root:
            say_once(f"The folder {folder!a} is gone; its files are ignored.")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        say_once(f"The folder {_shown(folder)} cannot be read ({error}); its files are ignored.")
    return []


def _real(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):
        return folder


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_usable(entry: os.DirEntry[str]) -> bool:
    try:
        entry.path.encode()
        if entry.is_file():
            return True
        what = f"it is {describe_mode(entry.stat().st_mode)}, not a file"
    except UnicodeEncodeError:
        what = "its name is not UTF-8; rename it"
    except FileNotFoundError:
        what = "it is a link to a missing file"
    except OSError as error:
        what = f"it cannot be read ({error.strerror or error})"
    say_once(f"{_shown(entry.path)} is ignored: {what}.")
    return False


def _shown(path: str) -> str:
    return path if path.isprintable() else ascii(path)


@functools.lru_cache(maxsize=4096)
def say_once(message: str) -> None:
    """Warn about an unusable file. Folders are listed with every request, so each message is logged only once."""
    logger.warning("%s", message)
