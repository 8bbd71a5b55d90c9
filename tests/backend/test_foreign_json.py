from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from backend.foreign_json import MAX_ITEMS, ForeignJsonError, open_file, parse_json, parse_resolution, read_json_file


@pytest.mark.parametrize("text", ["[" * 1000 + "]" * 1000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 65 + "]" * 65, "[" * 100_000])
def test_what_is_nested_too_deep_is_refused_by_name(text: str) -> None:
    with pytest.raises(ForeignJsonError, match=r"nested deeper than 64 levels"):
        parse_json(text)


def test_sixty_four_levels_are_read() -> None:
    assert parse_json("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)


@pytest.mark.parametrize(("text", "value"), [("1e400", "1e400"), ("[NaN, -Infinity]", ["NaN", "-Infinity"]), ("9" * 5000, "9" * 5000), ("12", 12)])
def test_numbers_that_json_cannot_say_again_stay_texts(text: str, value: object) -> None:
    read = parse_json(text)
    assert read == value
    json.dumps(read, allow_nan=False)


@pytest.mark.parametrize("text", ['{"\\ud800": ["\\udfff"]}', b'{"\\uD800": ["\\udfff"]}'])
def test_half_a_letter_becomes_a_question_mark(text: str | bytes) -> None:
    assert parse_json(text) == {"?": ["?"]}
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00{", b'{"a": "\xe9"}', b"", b"{", "nothing"])
def test_invalid_json_is_refused(content: str | bytes) -> None:
    with pytest.raises(ForeignJsonError):
        parse_json(content)


def test_size_and_number_of_entries_are_bounded() -> None:
    with pytest.raises(ForeignJsonError, match="entries"):
        parse_json("[" + "1," * MAX_ITEMS + "1]")
    with pytest.raises(ForeignJsonError, match="larger"):
        parse_json(b'"aaaaaaaa"', max_bytes=8)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, not a file"):
        open_file(tmp_path / "pipe")
    with pytest.raises(OSError):
        open_file(Path("/dev/zero"))
    with pytest.raises(OSError):
        open_file(tmp_path / "a\0b")
    with pytest.raises(OSError):
        read_json_file(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(OSError):
            open_file(tmp_path / "s")


@pytest.mark.parametrize(
    ("value", "sides"),
    [
        *[("64x96", (64, 96)), ("512", (512, 512)), (" 1024 X 768 ", (1024, 768)), (512, (512, 512))],
        *[(odd, None) for odd in ("9" * 5000, "1²3", "", None, [1])],
    ],
)  # fmt: skip
def test_a_resolution_is_two_short_numbers_or_nothing(value: object, sides: tuple[int, int] | None) -> None:
    assert parse_resolution(value) == sides
