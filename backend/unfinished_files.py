"""Writes files atomically, under one form of temporary name, by which `modules/pictures/unfinished_files.py` recognizes the leftovers of a
killed run.

Standard library only: the launcher uses it too.
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
"""With dot, digits and suffix, the name stays below the 255 bytes that file systems allow."""


def unfinished_name(path: Path) -> Path:
    """A new hidden name next to `path`: its name (shortened if needed), twelve hexadecimal digits, `.tmp`."""
    name = os.fsencode(path.name)[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{name or 'file'}.{secrets.token_hex(6)}.tmp")


def is_unfinished_name(name: str) -> bool:
    """Whether it has the form of `unfinished_name`, which nothing else has."""
    return _OURS.fullmatch(name) is not None


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a new file. Raises: FileExistsError at the end if `path` exists by then, which stays unchanged."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        publish_new(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to. At the end that file replaces `path` atomically; after an error it is deleted and `path` is unchanged."""
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def publish_new(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its name atomically. Raises: FileExistsError if the name is taken, even by a file created meanwhile."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        _publish_without_links(temporary, final)
    else:
        temporary.unlink()


def _publish_without_links(temporary: Path, final: Path) -> None:
    """For file systems without hard links: claim the name with a file next to it, then rename if it is free. A dead owner's claim stays."""
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
    """Write `content` to `path`, readable by its owner only. Readers see the old file or the complete new one, even after a crash.

    Creates the folder. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, open(unfinished, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_text(path: Path, text: str) -> None:
    """Append `text` to a file, which is created if missing. After an error the file is as long as before. Raises: OSError."""
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
