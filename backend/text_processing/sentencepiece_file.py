"""Reads and writes SentencePiece's model files: the pieces with their scores, and the table of character normalization.

Supports the parts of the protobuf wire format that these files use. Linear in the file's length; other fields are skipped. Must not know which model
the pieces belong to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PIECES, _NORMALIZER, _CHARSMAP = 1, 3, 2
_TEXT, _SCORE, _KIND = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class SentencePieceError(ValueError):
    """The bytes are not a SentencePiece model."""


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """`pieces`: (text, log probability) by id, `kinds`: NORMAL, CONTROL .. of each. `charsmap`: the precompiled normalization, as the library
    `tokenizers` takes it."""

    pieces: tuple[tuple[str, float], ...]
    charsmap: bytes
    kinds: tuple[int, ...] = ()


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Raises: SentencePieceError."""
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    charsmap = b""
    for field, value in _fields(memoryview(data)):
        if field == _PIECES:
            text, score, kind = _read_piece(_as_bytes(value))
            pieces.append((text, score))
            kinds.append(kind)
        elif field == _NORMALIZER:
            charsmap = next((bytes(_as_bytes(inner)) for name, inner in _fields(_as_bytes(value)) if name == _CHARSMAP), charsmap)
    if not pieces:
        raise SentencePieceError("the SentencePiece model has no pieces")
    return SentencePieceModel(tuple(pieces), charsmap, tuple(kinds))


def write_sentencepiece(model: SentencePieceModel) -> bytes:
    """The file that `read_sentencepiece` reads this model from."""
    kinds = model.kinds or (NORMAL,) * len(model.pieces)
    whole = bytearray()
    for (text, score), kind in zip(model.pieces, kinds, strict=True):
        piece = _field(_TEXT, text.encode()) + bytes([_SCORE << 3 | _FIXED32]) + struct.pack("<f", score) + bytes([_KIND << 3 | _VARINT, kind & 0x7F])
        whole += _field(_PIECES, piece)
    if model.charsmap:
        whole += _field(_NORMALIZER, _field(_CHARSMAP, model.charsmap))
    return bytes(whole)


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes, whose length comes first."""
    length, head = len(data), bytearray([number << 3 | _BYTES])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + data


def _read_piece(data: memoryview) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == _TEXT:
            text = _as_text(_as_bytes(value))
        elif field == _SCORE:
            score = _as_float(_as_bytes(value))
        elif field == _KIND and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of each field. Groups, which are obsolete, are an error."""
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, position = _read_varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise SentencePieceError(f"the SentencePiece model has a field of unknown kind {kind} at byte {position}")
        if position + length > len(data):
            raise SentencePieceError(f"the SentencePiece model ends in the middle of a field of {length} bytes")
        yield tag >> 3, data[position : position + length]
        position += length


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; (value, position behind it)."""
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        if position + place >= len(data):
            break
        byte = data[position + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, position + place + 1
    raise SentencePieceError(f"the SentencePiece model has an unfinished number at byte {position}")


def _as_bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise SentencePieceError("the SentencePiece model has a number where a text belongs")
    return value


def _as_text(data: memoryview) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SentencePieceError(f"the SentencePiece model has a piece that is not UTF-8 ({error})") from error


def _as_float(data: memoryview) -> float:
    if len(data) != 4:
        raise SentencePieceError(f"the SentencePiece model has a score of {len(data)} bytes; it takes 4")
    return float(struct.unpack("<f", data)[0])
