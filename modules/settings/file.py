"""Reads a settings file that may be damaged: recovers what is readable, key by key, and keeps a copy of the file.

Knows JSON and files, but no settings.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # the library's own reader of strings
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 16
MAX_ITEMS = 10_000
MAX_TEXT_CHARS = 100_000
_LARGEST_INT = 2**63
_BLANKS = " \t\r\n"


def problem_with(value: Any) -> str | None:
    """Why `value` cannot be a setting, in words; None if it can. Checks every level without recursion."""
    waiting, num_items = [(value, 0)], 0
    while waiting:
        entry, depth = waiting.pop()
        num_items += 1
        if depth > MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} deep"
        if num_items > MAX_ITEMS:
            return f"it contains more than {MAX_ITEMS} values"
        if isinstance(entry, str):
            if (why := _problem_with_text(entry)) is not None:
                return why
        elif isinstance(entry, dict):
            waiting += [(part, depth + 1) for pair in entry.items() for part in pair]
        elif isinstance(entry, (list, tuple)):
            waiting += [(part, depth + 1) for part in entry]
        elif isinstance(entry, int) and abs(entry) > _LARGEST_INT:
            return "its number is too large"
        elif isinstance(entry, float) and not math.isfinite(entry):
            return "its number is not finite"
        elif entry is not None and not isinstance(entry, (int, float)):
            return f"a {type(entry).__name__} cannot be stored in the settings file"
    return None


def _problem_with_text(text: str) -> str | None:
    if len(text) > MAX_TEXT_CHARS:
        return f"its text is longer than {MAX_TEXT_CHARS} characters"
    if "\0" in text:
        return "its text contains a NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "its text is not Unicode (UTF-8)"
    return None


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(values by key, problems by key) of the file; the key "" is for problems with the whole file. Raises OSError."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return {}, {"": f"it is larger than {MAX_FILE_BYTES >> 20} MiB"}
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        return _salvage(text)
    if not isinstance(loaded, dict):
        return {}, {"": "it does not contain a JSON object"}
    return _sorted_out(loaded.items())


def _sorted_out(pairs: Any) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, value in pairs:
        why = _problem_with_text(key) or problem_with(value)
        if why is None:
            values[key] = value
        else:
            problems[key.encode("utf-8", "replace").decode()[:200]] = why
    return values, problems


def _salvage(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    problems: dict[str, str] = {}
    values, unsound = _sorted_out(_readable_pairs(text, problems))
    return values, {**problems, **unsound}


def _readable_pairs(text: str, problems: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The pairs of a broken JSON object as far as they can be parsed; the rest is recorded in `problems`."""
    place = _skip_blanks(text, 0)
    if text[place : place + 1] != "{":
        problems[""] = "it is not JSON"
        return
    place = _skip_blanks(text, place + 1)
    while text[place : place + 1] == '"':
        try:
            key, place = scanstring(text, place + 1, False)
        except ValueError:
            problems[""] = "it ends inside a name"
            return
        place = _skip_blanks(text, place)
        if text[place : place + 1] != ":":
            problems[key] = "there is no value"
            return
        end = _end_of_value(text, place + 1)
        try:
            yield key, json.loads(text[place + 1 : end])
        except (ValueError, RecursionError):
            problems[key] = "its value is not JSON, or nested too deeply"
        place = _skip_blanks(text, end)
        if text[place : place + 1] == "}":
            return
        place = _skip_blanks(text, place + 1)
    problems.setdefault("", "it ends early")


def _skip_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANKS:
        place += 1
    return place


def _end_of_value(text: str, place: int) -> int:
    """The end of the value starting at `place`: the next comma or bracket on its own level."""
    depth, in_text = 0, False
    while place < len(text):
        letter = text[place]
        if in_text:
            if letter == "\\":
                place += 1
            in_text = letter != '"'
        elif letter == '"':
            in_text = True
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            if depth == 0:
                return place
            depth -= 1
        elif letter == "," and depth == 0:
            return place
        place += 1
    return place


def back_up(path: Path) -> Path | None:
    """Copy the file to `<name>.unreadable` (or a numbered name) unless an identical copy exists; move a folder. None if that fails."""
    try:
        target = path.with_name(f"{path.name}.unreadable")
        number = 1
        while target.exists() or target.is_symlink():
            if path.is_file() and target.is_file() and target.read_bytes() == path.read_bytes():
                return target
            target = path.with_name(f"{path.name}.unreadable-{number}")
            number += 1
        if path.is_file():
            shutil.copyfile(path, target)
        else:
            path.rename(target)
    except OSError as error:
        log.error("%s could not be backed up (%s).", path, error)
        return None
    return target
