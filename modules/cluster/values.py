"""Values as bytes and back, for requests and results that travel between machines and lie in the store.

A message is a JSON header and the raw bytes of its pictures and arrays. Reading one runs no code and decodes no file format: whatever is wrong with
it is a MessageError. Pictures travel as raw pixels, so a picture cannot be larger than its bytes.

    magic (4) | length of the header (8, little endian) | header | blobs, one after another
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.errors import RequestError

MAGIC = b"MGW1"
MAX_DEPTH = 48
MAX_NODES = 1_000_000
MAX_HEADER_BYTES = 64 << 20
MAX_MESSAGE_BYTES = 4 << 30
_HEAD_BYTES = 12
_TAG = "$"
_BANDS = {"1": 1, "L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "F": 4, "I": 4, "I;16": 2}
_KINDS = "biufc?"
_EXTENSION_FOLDERS = frozenset({"extensions", "extensions-builtin"})


class MessageError(RequestError):
    """Bytes that are not a message, or a value that cannot be sent."""


def pack(value: Any, *, what: str = "request") -> bytes:
    """`value` as a message. Raises MessageError naming the place of a value that cannot travel, such as a function."""
    writer = _Writer()
    tree = writer.tree(value, what, 0)
    header = json.dumps({"tree": tree, "blobs": [len(blob) for blob in writer.blobs]}, separators=(",", ":"), allow_nan=False).encode()
    return b"".join([MAGIC, len(header).to_bytes(8, "little"), header, *writer.blobs])


def unpack(message: bytes, *, what: str = "request", types: Mapping[str, type] | None = None) -> Any:
    """The value of a message. `types`: classes of dataclasses and enums that may occur, by the name that `pack` wrote. Raises MessageError."""
    header, start = _read_header(message, what)
    blobs = _cut_blobs(message, header.get("blobs"), start, what)
    return _Reader(blobs, types, what).value(header.get("tree"), 0)


def _read_header(message: bytes, what: str) -> tuple[dict[str, Any], int]:
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{what}: {len(message)} bytes are too many; the limit is {MAX_MESSAGE_BYTES}.")
    if len(message) < _HEAD_BYTES or message[:4] != MAGIC:
        raise MessageError(f"{what}: these bytes are not a message of this program.")
    num_bytes = int.from_bytes(message[4:_HEAD_BYTES], "little")
    start = _HEAD_BYTES + num_bytes
    if num_bytes > MAX_HEADER_BYTES or start > len(message):
        raise MessageError(f"{what}: the message ends inside its header.")
    try:
        header = json.loads(message[_HEAD_BYTES:start], parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise MessageError(f"{what}: the header of the message is damaged.") from None
    if not isinstance(header, dict):
        raise MessageError(f"{what}: the header of the message is damaged.")
    return header, start


def _refuse(name: str) -> None:
    raise ValueError(name)


def _cut_blobs(message: bytes, lengths: Any, start: int, what: str) -> list[memoryview]:
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise MessageError(f"{what}: the message does not say where its data is.")
    if start + sum(lengths) != len(message):
        raise MessageError(f"{what}: the message has {len(message) - start} bytes of data instead of {sum(lengths)}; it was cut off or damaged.")
    view, blobs = memoryview(message), []
    for length in lengths:
        blobs.append(view[start : start + length])
        start += length
    return blobs


class _Writer:
    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self._num_nodes = 0

    def tree(self, value: Any, where: str, depth: int) -> Any:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise MessageError(f"{where}: is nested too deeply or has too many parts to be sent to a worker.")
        if value is None or (isinstance(value, (bool, str)) and type(value) in (bool, str)):
            return value
        if isinstance(value, enum.Enum):
            return {_TAG: "enum", "type": _type_name(type(value)), "name": value.name}
        if isinstance(value, (int, np.integer)):
            return int(value)
        if isinstance(value, (float, np.floating)):
            return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(float(value))}
        if isinstance(value, str):
            return str(value)
        return self._large(value, where, depth)

    def _large(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, Image.Image):
            return self._picture(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
            return {_TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "blob": self._blob(np.ascontiguousarray(value).tobytes())}
        if isinstance(value, (bytes, bytearray, memoryview)):
            return {_TAG: "bytes", "blob": self._blob(bytes(value))}
        if isinstance(value, Mapping):
            return self._mapping(value, where, depth)
        if isinstance(value, list):
            return [self.tree(entry, f"{where}[{index}]", depth + 1) for index, entry in enumerate(value)]
        if isinstance(value, (tuple, set, frozenset)):
            entries = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            kind = "tuple" if isinstance(value, tuple) else "set"
            return {_TAG: kind, "items": [self.tree(entry, f"{where}[{index}]", depth + 1) for index, entry in enumerate(entries)]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            return {_TAG: "object", "type": _type_name(type(value)), "fields": self._mapping(fields, where, depth)}
        raise MessageError(f"{where}: a {type(value).__name__} cannot be sent to a worker.")

    def _mapping(self, value: Mapping[Any, Any], where: str, depth: int) -> Any:
        if all(isinstance(key, str) for key in value) and _TAG not in value:
            return {str(key): self.tree(entry, f"{where}.{key}", depth + 1) for key, entry in value.items()}
        items = [[self.tree(key, where, depth + 1), self.tree(entry, f"{where}[{key!r:.40}]", depth + 1)] for key, entry in value.items()]
        return {_TAG: "dict", "items": items}

    def _picture(self, picture: Image.Image) -> dict[str, Any]:
        plain = picture if picture.mode in _BANDS else picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        return {_TAG: "picture", "mode": plain.mode, "size": list(plain.size), "blob": self._blob(plain.tobytes())}

    def _blob(self, data: bytes) -> int:
        self.blobs.append(data)
        return len(self.blobs) - 1


class _Reader:
    def __init__(self, blobs: Sequence[memoryview], types: Mapping[str, type] | None, what: str) -> None:
        self._blobs = blobs
        self._types = types
        self._what = what
        self._num_nodes = 0

    def value(self, tree: Any, depth: int) -> Any:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise self._error("is nested too deeply or has too many parts")
        if isinstance(tree, list):
            return [self.value(entry, depth + 1) for entry in tree]
        if not isinstance(tree, dict):
            return tree
        if _TAG not in tree:
            return {key: self.value(entry, depth + 1) for key, entry in tree.items()}
        try:
            return self._tagged(tree, depth)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._error(f"contains a broken {str(tree[_TAG])[:20]!r} ({type(error).__name__})") from None

    def _tagged(self, tree: dict[str, Any], depth: int) -> Any:
        kind = tree[_TAG]
        if kind == "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[tree["value"]]
        if kind == "picture":
            return self._picture(tree)
        if kind == "array":
            return self._array(tree)
        if kind == "bytes":
            return bytes(self._blob(tree))
        if kind == "dict":
            return {self.value(key, depth + 1): self.value(entry, depth + 1) for key, entry in tree["items"]}
        if kind in ("tuple", "set"):
            items = [self.value(entry, depth + 1) for entry in tree["items"]]
            return tuple(items) if kind == "tuple" else set(items)
        if kind == "enum":
            return self._type(tree["type"], enum.Enum)[tree["name"]]
        if kind == "object":
            fields = self.value(tree["fields"], depth + 1)
            return self._type(tree["type"], None)(**fields)
        raise self._error(f"contains an unknown {str(kind)[:20]!r}")

    def _picture(self, tree: dict[str, Any]) -> Image.Image:
        mode, (width, height) = tree["mode"], tree["size"]
        if mode not in _BANDS or type(width) is not int or type(height) is not int or width < 1 or height < 1:
            raise ValueError(mode)
        blob = self._blob(tree)
        row_bytes = -(-width // 8) if mode == "1" else width * _BANDS[mode]
        if len(blob) != row_bytes * height:
            raise ValueError(len(blob))
        return Image.frombytes(mode, (width, height), bytes(blob))

    def _array(self, tree: dict[str, Any]) -> np.ndarray:
        dtype, shape = np.dtype(tree["dtype"]), tree["shape"]
        if dtype.kind not in _KINDS or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(shape)
        return np.frombuffer(self._blob(tree), dtype=dtype).reshape(shape).copy()

    def _blob(self, tree: dict[str, Any]) -> memoryview:
        index = tree["blob"]
        if type(index) is not int or not 0 <= index < len(self._blobs):
            raise ValueError(index)
        return self._blobs[index]

    def _type(self, name: Any, base: type | None) -> Any:
        """A class that a message may name: one given to `unpack`, else a dataclass or enum of a module that is loaded already."""
        known = self._types.get(name) if self._types is not None else find_type(str(name))
        if known is None or (base is not None and not issubclass(known, base)):
            raise self._error(f"names {str(name)[:80]!r}, which this machine does not have")
        return known

    def _error(self, text: str) -> MessageError:
        return MessageError(f"{self._what}: the message {text}.")


def _type_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def find_type(name: str) -> type | None:
    """The dataclass or enum `module:Class` of an extension, for arguments of scripts. Imports nothing: only what an extension has loaded counts."""
    module_name, _, class_name = name.partition(":")
    module = sys.modules.get(module_name)
    folders = Path(getattr(module, "__file__", None) or "").parts
    found = getattr(module, class_name, None)
    if not _EXTENSION_FOLDERS & set(folders) or not isinstance(found, type) or found.__module__ != module_name:
        return None
    return found if dataclasses.is_dataclass(found) or issubclass(found, enum.Enum) else None
