"""Files written whole or not at all, and the one form of name they have meanwhile: by it `modules/pictures/unfinished_files.py` knows what a
killed run left.

Standard library only: the launcher writes by it too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_OURS = re.compile(r"\..+\.[0-9a-f]{12}\.tmp", re.DOTALL)
_MAX_NAME_BYTES = 160
"""With dot, digits and suffix this stays below the 255 that file systems allow."""


def unfinished_name(path: Path) -> Path:
    """A new hidden name beside `path`: its name (or what fits of it), twelve hexadecimal digits, `.tmp`."""
    name = os.fsencode(path.name)[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{name or 'file'}.{secrets.token_hex(6)}.tmp")


def is_unfinished_name(name: str) -> bool:
    """Does it have the form that `unfinished_name` gives, and nothing else does?"""
    return _OURS.fullmatch(name) is not None


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """As `replacing`, for a new file: Raises FileExistsError at the end when `path` is there by then, and leaves it as it is."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        publish_new(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under. What is there at the end takes the place of `path` in one step; after an error it is gone, and `path` is as before."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def publish_new(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its name, in one step. Raises FileExistsError when the name is taken, also by a file made meanwhile."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        _publish_without_links(temporary, final)
    else:
        temporary.unlink()


def _publish_without_links(temporary: Path, final: Path) -> None:
    """For file systems without hard links: claim the name by a file beside it, then rename if it is free. A claim whose owner died stays."""
    if os.name == "nt":
        temporary.rename(final)  # fails on Windows when the name is taken
        return
    claim = final.with_name(f".{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}.claim")
    os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        temporary.replace(final)
    finally:
        claim.unlink()


def replace_content(path: Path, content: bytes) -> None:
    """`path` holds `content`, in a file that its owner alone may read. Readers see the old file or the whole new one, also after a crash.

    Makes the folder. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, open(unfinished, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_text(path: Path, text: str) -> None:
    """Add `text` to the end of a file, which is made: all of it, or the file is as long as before. Raises: OSError."""
    old_bytes = path.stat().st_size if path.exists() else None
    try:
        with path.open("ab") as file:
            file.write(text.encode("utf-8"))
    except OSError:
        if old_bytes is None:
            path.unlink(missing_ok=True)
        else:
            os.truncate(path, old_bytes)
        raise
