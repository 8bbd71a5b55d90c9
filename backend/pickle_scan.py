"""Checks a pickle's instructions before any of them is executed: size, depth, stack balance, and the names it asks for.

The reader used afterwards (PyTorch's restricted one) runs no foreign code, but trusts sizes and depth: Python's hash of a tuple nested 100,000 deep
kills the process. Nothing is built here; each instruction costs one step.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from backend.foreign_json import open_file

MAX_PICKLE_BYTES = 16 * 2**20
"""A checkpoint's names and shapes take a few hundred kB; its tensors are outside the pickle."""
MAX_DEPTH = 100
_MAX_STORAGE_RECORDS = 200_000
_LEGACY_PICKLES = 5
"""In a file from before PyTorch 1.6: magic number, protocol, system, content, names of storages."""


class DamagedPickleError(ValueError):
    """Not a pickle, or damaged or far too large; the message says what is wrong."""


@dataclass(slots=True)
class _Depths:
    """The unpickler's stack, with each value replaced by its depth; None is a mark."""

    stack: list[int | None] = field(default_factory=list)
    memo: dict[int, int] = field(default_factory=dict)
    deepest: int = 0

    def step(self, opcode: Any, argument: Any) -> None:
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self._top()
            return
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise DamagedPickleError(f"it reads memo {argument}, which it never wrote")
            self.stack.append(self.memo[argument])
            return
        taken = self._take(opcode.stack_before)
        depth = 1 + max(taken, default=-1)
        self.deepest = max(self.deepest, depth)
        self.stack += [None if kind is pickletools.markobject else depth for kind in opcode.stack_after]

    def _top(self) -> int:
        if not self.stack or (top := self.stack[-1]) is None:
            raise DamagedPickleError("its stack is unbalanced: it pops values that do not exist")
        return top

    def _take(self, kinds: list[Any]) -> list[int]:
        taken: list[int] = []
        if pickletools.markobject in kinds:
            while self.stack and self.stack[-1] is not None:
                taken.append(self._top())
                self.stack.pop()
            if not self.stack:
                raise DamagedPickleError("its stack is unbalanced: it ends a group that it never started")
            self.stack.pop()
            kinds = kinds[: kinds.index(pickletools.markobject)]
        for _ in kinds:
            taken.append(self._top())
            self.stack.pop()
        return taken


def scan_pickle(stream: BinaryIO) -> set[str]:
    """Names ("package.module.name") that a pickle asks for. Leaves `stream` at the pickle's end. Raises: DamagedPickleError."""
    depths, names = _Depths(), set()
    try:
        for opcode, argument in _instructions(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            depths.step(opcode, argument)
            if depths.deepest > MAX_DEPTH:
                raise DamagedPickleError(f"it is nested deeper than {MAX_DEPTH} levels")
    except DamagedPickleError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, struct.error, EOFError) as error:
        raise DamagedPickleError(str(error)) from error
    return names


def _instructions(stream: BinaryIO) -> Iterator[tuple[Any, Any]]:
    instructions = pickletools.genops(stream)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about strings with invalid escapes
            step = next(instructions, None)
        if step is None:
            return
        yield step[0], step[1]


def scan_file(path: Path) -> set[str]:
    """Names that the pickles of a PyTorch file (zip or legacy) ask for. Raises: DamagedPickleError, OSError."""
    if zipfile.is_zipfile(path):
        return _scan_zip(path)
    names: set[str] = set()
    with open_file(path) as file:
        bounded: Any = _Bounded(file, MAX_PICKLE_BYTES)
        names |= scan_pickle(bounded)
        for _ in range(_LEGACY_PICKLES - 1 if bounded.tell() < path.stat().st_size else 0):
            names |= scan_pickle(bounded)
    return names


def _scan_zip(path: Path) -> set[str]:
    names: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries)
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    with archive.open(entry) as stream:
                        names |= scan_pickle(stream)  # type: ignore[arg-type]  # a reader of bytes
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # RuntimeError: it asks for a password
        raise DamagedPickleError(str(error)) from error
    return names


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > _MAX_STORAGE_RECORDS:
        raise DamagedPickleError(f"its archive has {len(entries):,} entries")
    for entry in entries:
        is_storage = "/data/" in f"/{entry.filename}"
        if is_storage and entry.compress_type != zipfile.ZIP_STORED:
            raise DamagedPickleError("its archive was repacked with compression, which PyTorch's files never have")
        if not is_storage and entry.file_size > MAX_PICKLE_BYTES:
            raise DamagedPickleError(
                f"{entry.filename} in it unpacks to {entry.file_size / 1e6:,.0f} MB; the limit is {MAX_PICKLE_BYTES // 10**6} MB"
            )


class _Bounded:
    """A file that raises an error after `max_bytes`: tensors come after the pickles, and no pickle is that long."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._left = file, max_bytes

    def read(self, count: int = -1) -> bytes:
        return self._count(self._file.read(min(count, self._left + 1) if count >= 0 else self._left + 1))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def tell(self) -> int:
        return self._file.tell()

    def _count(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise DamagedPickleError(f"its pickle is larger than {MAX_PICKLE_BYTES / 1e6:,.0f} MB")
        return content
