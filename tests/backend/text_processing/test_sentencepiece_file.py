from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.text_processing.sentencepiece_file import SentencePieceError, read_sentencepiece


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def _piece(text: str, score: bytes) -> bytes:
    return _field(1, _field(1, text.encode()) + bytes([2 << 3 | 5]) + score + bytes([3 << 3, 2]))


def test_pieces_and_characters_are_read_past_what_is_unknown() -> None:
    unknown = bytes([9 << 3, 0x96, 0x01]) + bytes([10 << 3 | 1]) + bytes(8) + _field(4, b"options")
    model = read_sentencepiece(_piece("\u2581a", b"\x00\x00\x80\xbf") + unknown + _field(3, _field(1, b"nmt") + _field(2, b"\x01\x02")))
    assert model.pieces == (("\u2581a", -1.0),)
    assert model.charsmap == b"\x01\x02"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no pieces"),
        (_piece("a", bytes(4))[:-4], "ends in the middle"),
        (bytes([1 << 3 | 2, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F]), "ends in the middle"),
        (b"\xff" * 40, "unfinished number"),
        (bytes([1 << 3 | 3]), "unknown kind 3"),
        (bytes([1 << 3, 5]), "a number where a text belongs"),
        (_field(1, _field(1, b"\xff")), "not UTF-8"),
        (_field(1, _field(2, b"12345")), "a score of 5 bytes"),
    ],
)
def test_other_bytes_are_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(SentencePieceError, match=words):
        read_sentencepiece(data)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_else(data: bytes) -> None:
    with contextlib.suppress(SentencePieceError):
        assert read_sentencepiece(data).pieces
