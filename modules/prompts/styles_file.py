"""Reads a styles file so that it can be written back without loss: CSV as written by this program, by others, and by hand.

    name,prompt,negative_prompt
    # my favorites
    fox, "a fox, red", "blurry"

Fields are separated by commas, semicolons or tabs, whichever fits the first row, which names the columns. Spaces before a field are ignored.
Rows starting with # are comments. Must not know what styles are for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from modules.errors import RequestError

COLUMNS = ("name", "prompt", "negative_prompt")
_OTHER_NAMES = {"text": "prompt", "negative": "negative_prompt", "negative prompt": "negative_prompt"}
_DELIMITERS = ",;\t"
_SHOWN_CHARS = 60


class StylesFileError(RequestError):
    """A styles file exists but cannot be read, and is therefore not overwritten."""


@dataclass(slots=True)
class StylesFile:
    """`rows` are in file order: the fields of a style, or the text of a line that is not one. `unclear` lists complaints about rows; a file with
    complaints is not written.
    """

    path: Path
    delimiter: str = ","
    header: list[str] = field(default_factory=lambda: list(COLUMNS))
    rows: list[list[str] | str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    lines_before_header: list[str] = field(default_factory=list)

    def styles(self) -> Iterator[tuple[str, str, str]]:
        """(name, prompt, negative prompt) of each row with a name."""
        for row in self.rows:
            if not isinstance(row, str) and self._field(row, "name"):
                yield self._field(row, "name"), self._field(row, "prompt"), self._field(row, "negative_prompt")

    def update(self, styles: Mapping[str, tuple[str, str]], dropped: Iterable[str]) -> None:
        """Set prompts by name, append new ones, and drop `dropped`. All other rows and columns stay."""
        for name in (name for name in COLUMNS if name not in self._columns()):
            self.header.append(name)
        gone = set(dropped)
        self.rows = [row for row in self.rows if isinstance(row, str) or self._field(row, "name") not in gone]
        place = {self._field(row, "name"): row for row in self.rows if not isinstance(row, str)}
        for name, prompts in styles.items():
            row = place.get(name)
            if row is None:
                self.rows.append(row := [])
            row += [""] * (len(self.header) - len(row))
            for column, value in zip(COLUMNS, (name, *prompts)):
                row[self._columns().index(column)] = value

    def text(self) -> str:
        lines = [*self.lines_before_header, self._line(self.header)]
        return "".join([*lines, *(row if isinstance(row, str) else self._line(row) for row in self.rows)])

    def _columns(self) -> list[str]:
        return _columns(self.header)

    def _field(self, row: Sequence[str], column: str) -> str:
        index = self._columns().index(column) if column in self._columns() else len(row)
        return row[index] if index < len(row) else ""

    def _line(self, fields: Iterable[str]) -> str:
        return f"{self.delimiter.join(_quoted(value, self.delimiter) for value in fields)}\n"


def parse_styles_file(path: Path, text: str) -> StylesFile:
    """Raises StylesFileError if the columns name and prompt are missing, or if the text ends inside a field."""
    lines = iter(io.StringIO(text, newline=""))
    before = []
    for line in lines:
        if line.strip() and not _is_comment(line):
            break
        before.append(_whole(line))
    else:
        return StylesFile(path, lines_before_header=before)
    delimiter, header = _header(path, line)
    file = StylesFile(path, delimiter, header, lines_before_header=before)
    for number, row in enumerate(_rows(path, lines, delimiter), 1):
        file.rows.append(row)
        if not isinstance(row, str) and any(row[len(header) :]):
            shown = delimiter.join(row)[:_SHOWN_CHARS]
            file.unclear.append(f"row {number} after the header has {len(row)} fields instead of {len(header)}: {shown!r}")
    return file


def _columns(header: Iterable[str]) -> list[str]:
    names = [name.strip().lower() for name in header]
    return [_OTHER_NAMES.get(name, name) for name in names]


def _header(path: Path, line: str) -> tuple[str, list[str]]:
    for delimiter in _DELIMITERS:
        header = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        if {"name", "prompt"} <= set(_columns(header)):
            return delimiter, header
    raise StylesFileError(
        f"Styles file {path} begins with {line.strip()[:_SHOWN_CHARS]!r} instead of the names of its columns. "
        f"Put the line {','.join(COLUMNS)} above its styles, or move it away."
    )


def _rows(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[list[str] | str]:
    """The rows after the header; lines that are not rows, unchanged."""
    for line in lines:
        if _is_comment(line) or not line.strip():
            yield _whole(line)
            continue
        taken: list[str] = []
        try:
            yield next(csv.reader(_noted(chain([line], lines), taken), delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            if "unexpected end" in str(error) or "limit" in str(error):
                shown = line.strip()[:_SHOWN_CHARS]
                raise StylesFileError(f"Styles file {path}: row {shown!r} never ends ({error}). Close its quotes, or move the file away.") from error
            yield _forgiving(path, chain(taken, lines), delimiter)  # text after a closing quote belongs to the field


def _forgiving(path: Path, lines: Iterator[str], delimiter: str) -> list[str]:
    try:
        return next(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise StylesFileError(f"Styles file {path} is not a CSV file ({error}). Fix it or move it away.") from error


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _whole(line: str) -> str:
    return f"{line.rstrip(chr(10) + chr(13))}\n"


def _quoted(value: str, delimiter: str) -> str:
    is_plain = value == value.strip() and not value.startswith("#") and not any(char in value for char in f'{delimiter}"\r\n')
    return value if is_plain else '"' + value.replace('"', '""') + '"'
