"""Files are written completely or not at all, even on a disk with space for half of one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backend.unfinished_files import append_text, replace_content

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are set with the module resource")

ROOM_BYTES = 4096


@contextlib.contextmanager
def files_end_at(num_bytes: int) -> Iterator[None]:
    """Limit the size of this process's files: writes end there, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def replace_text(path: Path, text: str) -> None:
    replace_content(path, text.encode())


@pytest.mark.parametrize("write", [replace_text, append_text])
@pytest.mark.parametrize("before", [None, "before\n"])
def test_what_does_not_fit_leaves_the_file_as_it_was(write: Callable[[Path, str], None], before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with files_end_at(ROOM_BYTES), pytest.raises(OSError):
        write(path, "x" * 3 * ROOM_BYTES)
    assert [one.name for one in tmp_path.iterdir()] == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


def test_what_fits_is_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    replace_text(path, "one\n")
    append_text(path, "zwölf\n")
    assert path.read_text(encoding="utf-8") == "one\nzwölf\n"
