"""GGUF files: their header, checked before anything is believed, and their tensors, each read when it is requested.

Layout (ggml's docs/gguf.md, versions 2 and 3, little-endian): magic, version, number of tensors, number of entries; entries (key, type, value);
tensors (name, dims from the innermost, type, offset from the start of the data); padding; data. Not the `gguf` package's reader: it believes every
count and length in the header.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.file_bytes import FileBytes
from backend.foreign_json import open_file
from backend.gguf_names import one_too_large, rename_llama_cpp
from backend.storage.gguf import GgufFormat
from backend.storage.gguf_blocks import BLOCK_TYPES, TYPE_NAMES
from backend.storage.kinds import storage_of
from backend.storage.packed import PackedFormatError, PackedTensor, can_cut
from backend.tensor_file import REPEAT_DOWNLOAD, CheckpointError, TensorInfo, reading, say_mb

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PLAIN = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64, 28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
_UNREAD = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 41: "Q1_0"}
"""Types that are out of use, or that ggml uses only while it computes."""
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_HEADER_BYTES, _MAX_NAME_BYTES, _MAX_DIMS, _MAX_NESTING = 64 * 2**20, 1024, 8, 4
_WINDOW_BYTES = 2**20
"""The header consists of many short strings and is read in pieces of this size."""
_MAX_KEPT_BYTES, _MAX_KEPT_ITEMS = 65536, 16
"""Longer texts and lists are passed over; of a tokenizer's lists the place is kept."""
_LIST_HEAD_BYTES = 4 + 8
_LEAST_ENTRY_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8
_TOKENIZER_KEYS = "tokenizer.ggml."
_ALIGNMENT_KEY, _ARCHITECTURE_KEY, _SHAPE_KEY = "general.alignment", "general.architecture", "comfy.gguf.orig_shape."


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the header lists it. `shape`: outermost dim first, as torch has it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class _List:
    """A list in the header: the type of its values, their number, and its first byte."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class _Header:
    """`metadata`: as text. `lists`: a tokenizer's lists. `data_start`: where the data starts."""

    metadata: Mapping[str, str]
    lists: Mapping[str, _List]
    entries: Sequence[_Entry]
    data_start: int


class GgufFile:
    """A `.gguf` file of a denoiser, a text encoder or a whole checkpoint. Text encoders get the names that transformers gives them.

    Raises: CheckpointError for a header that is damaged, lies, or names a type that no reader has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), open_file(path) as stream:
            self._bytes = FileBytes(stream)
        try:
            header = _read_header(path, self._bytes)
            infos = {entry.name: _info_of(path, entry, header.metadata) for entry in header.entries}
            starts = {entry.name: header.data_start + entry.offset for entry in header.entries}
            self._check_extent(infos, starts)
            names = rename_llama_cpp(infos, header.metadata.get(_ARCHITECTURE_KEY, ""))
            self._one_too_large = frozenset(names.get(name, name) for name in one_too_large(infos) if infos[name].packed is None)
        except BaseException:
            self._bytes.close()
            raise
        self.metadata: Mapping[str, str] = header.metadata
        self._lists = header.lists
        self.infos: Mapping[str, TensorInfo] = {names.get(name, name): info for name, info in infos.items()}
        self._starts = {names.get(name, name): start for name, start in starts.items()}

    def _check_extent(self, infos: Mapping[str, TensorInfo], starts: Mapping[str, int]) -> None:
        end = max((starts[name] + info.stored_bytes for name, info in infos.items()), default=0)
        if end > self._bytes.length:
            raise CheckpointError(
                f"{self.path.name}: is cut short: it has {say_mb(self._bytes.length)}, but its header says {say_mb(end)}. {REPEAT_DOWNLOAD}"
            )

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        info = self.infos[key]
        if info.packed is None:
            shape, start = self._place(key, rows, info.stored_bytes)
            with reading(self.path):
                if key in self._one_too_large:
                    value = self._bytes.read(start, shape, info.dtype, dtype=torch.float32, device=device) - 1
                    return value.to(dtype or info.dtype)
                return self._bytes.read(start, shape, info.dtype, dtype=dtype, device=device)
        cut = None if rows is None or can_cut(info.packed, *rows) else rows
        stored = storage_of(self.read_stored(key, device=device, rows=rows if cut is None else None))
        value = stored.dequantize(dtype or torch.float32)
        return value if cut is None else value[cut[0] : cut[1]].clone()

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        form = self.infos[key].packed
        if form is None:
            return self.read(key, device=device, rows=rows)
        _, start = self._place(key, rows, form.num_bytes)
        part = form if rows is None else form.cut(*rows)
        with reading(self.path):
            return PackedTensor(self._bytes.read(start, (part.num_bytes,), torch.uint8, device=device), part)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts among the tokenizer's entries; empty if there is none. Raises: CheckpointError."""
        found = self._lists.get(key)
        if found is None or found.kind != _STRING:
            return ()
        cursor = _Cursor(self.path, self._bytes, found.start)
        return tuple(cursor.text("a token", _MAX_KEPT_BYTES) for _ in range(found.count))

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers among the tokenizer's entries; empty if there is none."""
        found = self._lists.get(key)
        if found is None or found.kind not in _SCALARS:
            return ()
        code = _SCALARS[found.kind]
        num_bytes = found.count * struct.calcsize(code)
        return struct.unpack(f"<{found.count}{code[1:]}", self._bytes.bytes_at(found.start, found.start + num_bytes))

    def _place(self, key: str, rows: tuple[int, int] | None, num_bytes: int) -> tuple[tuple[int, ...], int]:
        """Shape and first byte of a tensor or of its rows."""
        shape, start = self.infos[key].shape, self._starts[key]
        return (shape, start) if rows is None else ((rows[1] - rows[0], *shape[1:]), start + rows[0] * (num_bytes // shape[0]))

    def close(self) -> None:
        self._bytes.close()


class _Cursor:
    """Reads the header in order and never past its limit."""

    def __init__(self, path: Path, stored: FileBytes, position: int = 0) -> None:
        self._path, self._bytes, self.position = path, stored, position
        self.limit = min(stored.length, _MAX_HEADER_BYTES)
        self._window, self._window_start = b"", 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path.name}: {what}; the file is damaged. {REPEAT_DOWNLOAD}")

    def skip(self, count: int) -> int:
        """The position before `count` bytes, which are passed."""
        start = self.position
        if count > self.limit - start:
            if self.limit < self._bytes.length:
                raise self.fail(f"its header is longer than {_MAX_HEADER_BYTES // 2**20} MiB")
            raise CheckpointError(f"{self._path.name}: is cut short inside its header (it has {say_mb(self._bytes.length)}). {REPEAT_DOWNLOAD}")
        self.position = start + count
        return start

    def skip_texts(self, count: int) -> None:
        """Pass `count` texts."""
        position, limit, read = self.position, self.limit, self.bytes_at
        for _ in range(count):
            if position + 8 > limit:
                break
            position += 8 + int.from_bytes(read(position, position + 8), "little")
        else:
            self.skip(position - self.position)
            return
        self.skip(limit - self.position + 1)

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        return self.bytes_at(start, start + count)

    def bytes_at(self, start: int, end: int) -> bytes:
        """Bytes of the file, from a window that moves with them."""
        if start < self._window_start or end > self._window_start + len(self._window):
            self._window, self._window_start = self._bytes.bytes_at(start, max(end, start + _WINDOW_BYTES)), start
        return self._window[start - self._window_start : end - self._window_start]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, what: str, limit: int = _MAX_NAME_BYTES) -> str:
        length = self.number("<Q")
        if length > limit:
            raise self.fail(f"{what} in its header is {length} bytes long")
        return self.take(length).decode("utf-8", errors="replace")

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that take at least `least_bytes` each."""
        count: int = self.number("<Q")
        if count * least_bytes > self._bytes.length:
            raise self.fail(f"its header promises {count} {what}, more than the file has room for")
        return count


def _read_header(path: Path, stored: FileBytes) -> _Header:
    cursor = _Cursor(path, stored)
    cursor.take(len(MAGIC))
    version = cursor.number("<I")
    if version not in _VERSIONS:
        why = "it was written for another byte order" if version & 0xFFFF == 0 else f"versions {', '.join(map(str, _VERSIONS))} can be read"
        raise CheckpointError(f"{path.name}: is a GGUF file of version {version}; {why}. Convert it again from its source.")
    num_tensors, num_entries = cursor.count("tensors", _LEAST_TENSOR_BYTES), cursor.count("entries", _LEAST_ENTRY_BYTES)
    metadata, lists = _read_metadata(cursor, num_entries)
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    twice = len(entries) - len({entry.name for entry in entries})
    if twice:
        raise cursor.fail(f"{twice} names of tensors are in its header twice")
    alignment = _read_alignment(cursor, metadata)
    return _Header(metadata, lists, entries, -(-cursor.position // alignment) * alignment)


def _read_alignment(cursor: _Cursor, metadata: Mapping[str, str]) -> int:
    text = metadata.get(_ALIGNMENT_KEY, "32")
    alignment = int(text) if text.isdecimal() and len(text) < 8 else 0
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"its {_ALIGNMENT_KEY} is {text[:20]}, which is no power of two")
    return alignment


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, str], dict[str, _List]]:
    """(values as text, lists of a tokenizer)."""
    metadata: dict[str, str] = {}
    lists: dict[str, _List] = {}
    for _ in range(count):
        key = cursor.text("a key")
        kind = cursor.number("<I")
        start = cursor.position
        value = _read_value(cursor, kind, 0)
        if value is not None:
            metadata[key] = value
        if kind == _ARRAY and key.startswith(_TOKENIZER_KEYS):
            kind_of_values, length = struct.unpack("<IQ", cursor.bytes_at(start, start + _LIST_HEAD_BYTES))
            lists[key] = _List(kind_of_values, length, start + _LIST_HEAD_BYTES)
    return metadata, lists


def _read_value(cursor: _Cursor, kind: int, depth: int) -> str | None:
    """A value as text, lists with commas. None for what is passed over."""
    if kind in _SCALARS:
        return str(cursor.number(_SCALARS[kind]))
    if kind == _STRING:
        length = cursor.number("<Q")
        if length > _MAX_KEPT_BYTES:
            cursor.skip(length)
            return None
        return cursor.take(length).decode("utf-8", errors="replace")
    if kind == _ARRAY and depth < _MAX_NESTING:
        return _read_list(cursor, depth)
    raise cursor.fail(f"its header has a value of type {kind}{' in too many lists' if kind == _ARRAY else ''}")


def _read_list(cursor: _Cursor, depth: int) -> str | None:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind in _SCALARS and count > _MAX_KEPT_ITEMS:
        cursor.skip(count * struct.calcsize(_SCALARS[kind]))
        return None
    if count > cursor.limit - cursor.position:
        raise cursor.fail(f"its header has a list of {count} values, more than the file has room for")
    if kind == _STRING and count > _MAX_KEPT_ITEMS:
        cursor.skip_texts(count)
        return None
    values: list[str] | None = None if count > _MAX_KEPT_ITEMS else []
    for _ in range(count):
        value = _read_value(cursor, kind, depth + 1)
        if values is not None and value is not None:
            values.append(value)
    return None if values is None else ",".join(values)


def _read_tensor(cursor: _Cursor) -> _Entry:
    name = cursor.text("a tensor's name")
    num_dims = cursor.number("<I")
    if num_dims > _MAX_DIMS:
        raise cursor.fail(f"{name[:200]} has {num_dims} dimensions")
    dims = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims))
    return _Entry(name, dims[::-1], cursor.number("<I"), cursor.number("<Q"))


def _info_of(path: Path, entry: _Entry, metadata: Mapping[str, str]) -> TensorInfo:
    shape = _whole_shape(path, entry, metadata.get(_SHAPE_KEY + entry.name))
    if entry.kind in _PLAIN:
        return TensorInfo(shape, _PLAIN[entry.kind])
    kind = TYPE_NAMES.get(entry.kind)
    if kind is None:
        named = _UNREAD.get(entry.kind, "unknown")
        raise CheckpointError(
            f"{path.name}: {entry.name[:200]} is stored in GGUF's type {entry.kind} ({named}), which cannot be read. "
            f"Use a version in one of {', '.join(BLOCK_TYPES)}."
        )
    weights = BLOCK_TYPES[kind].weights
    if not entry.shape or entry.shape[-1] % weights:
        raise CheckpointError(
            f"{path.name}: {entry.name[:200]} has rows of {entry.shape[-1] if entry.shape else 1} numbers in {kind}, whose blocks have {weights}; "
            f"the file is damaged. {REPEAT_DOWNLOAD}"
        )
    try:
        return TensorInfo(shape, torch.uint8, GgufFormat(shape, kind))
    except PackedFormatError as error:
        raise CheckpointError(f"{path.name}: {entry.name[:200]}: {error}") from error


def _whole_shape(path: Path, entry: _Entry, text: str | None) -> tuple[int, ...]:
    """The tensor's shape, or the one it had before its rows were made fit for blocks (kernels of SD 1.x and SDXL)."""
    if text is None:
        return entry.shape
    parts = text.split(",")
    shape = tuple(int(part) for part in parts if part.isdecimal() and len(part) < 20)
    if len(shape) != len(parts) or len(shape) > _MAX_DIMS or prod(shape) != prod(entry.shape):
        raise CheckpointError(
            f"{path.name}: {_SHAPE_KEY}{entry.name[:200]} is {text[:80]}, which does not fit the shape {entry.shape}; the file is damaged. "
            f"{REPEAT_DOWNLOAD}"
        )
    return shape
