"""The text format of generation parameters: building and parsing it.

    a prompt, any number of lines
    Negative prompt: any number of lines
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Hires prompt: "quoted, because of the comma"

Pure text processing. Must not know settings, images, gradio or the engine (modules/infotext/parameters.py combines it with those).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

NEGATIVE_PREFIX = "Negative prompt:"
MINIMUM_PAIRS = 3
"""A last line with fewer `Key: value` pairs counts as part of the prompt."""

LEADING_KEYS = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Distilled CFG Scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "FP8 weight",
    "Cache FP16 weight for LoRA",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Conditional mask weight",
    "Clip skip",
    "ENSD",
    "Token merging ratio",
    "Token merging ratio hr",
    "Init image hash",
    "RNG",
    "Tiling",
)
TRAILING_KEYS = ("Version", "User", "Diffusion in Low Bits")
_RANK = {key: rank for rank, key in enumerate(LEADING_KEYS)} | {key: 1000 + rank for rank, key in enumerate(TRAILING_KEYS)}
_MIDDLE_RANK = 500
_MODULE_RANK = 2000

PAIRED_KEYS = ("Size", "Seed resize from", "First pass size", "Hires resize", "Original Size")
"""Keys whose `WxH` value is parsed into `Key-1` and `Key-2`."""

_KNOWN_KEYS = frozenset({*LEADING_KEYS, *TRAILING_KEYS, *PAIRED_KEYS})
_KEY_BACKWARDS = re.compile(r"[\w \-/]*")
_OPENING, _CLOSING = "([{<", ")]}>"
_STEPS_FIRST = "Steps:"
_QUOTED_VALUE = re.compile(r'"(?:\\.|[^\\"])+"')
_WIDTH_X_HEIGHT = re.compile(r"(\d+)x(\d+)")
_MODULE_KEY = re.compile(r"Module \d+")
_LONGEST_KEY = 200
_JSON = json.JSONDecoder()


def quote(value: object) -> str:
    """`value` as written after the colon: JSON-quoted if a comma, colon, newline, leading quote or outer space would be misread."""
    text = str(value)
    ambiguous = any(char in text for char in ",:\n\r") or text.startswith('"') or text != text.strip()
    return json.dumps(text, ensure_ascii=False) if ambiguous else text


def unquote(text: str) -> str:
    """The inverse of quote(); text that is not a JSON string is returned unchanged."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def build_infotext(prompt: str, negative_prompt: str, params: Mapping[str, Any]) -> str:
    """The infotext of one picture. Pairs with value None are left out; the last line's order is the one users know.

    `Size-1` and `Size-2` (as parsing returns them) are written as `Size: WxH`.
    """
    lines = [_one_text(prompt)]
    if negative_prompt:
        lines.append(f"{NEGATIVE_PREFIX} {_one_text(negative_prompt)}")
    lines.append(build_parameters_line(params))
    return "\n".join(lines)


def build_parameters_line(params: Mapping[str, Any]) -> str:
    """The `Key: value` pairs, joined by comma and space. If the key equals its value, it is printed once."""
    pairs = [(key, value) for key, value in _joined_pairs(params).items() if value is not None]
    pairs.sort(key=lambda pair: _rank(pair[0]))
    return ", ".join(key if key == str(value) else f"{key}: {quote(value)}" for key, value in pairs)


def _one_text(text: str) -> str:
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def _rank(key: str) -> int:
    return _MODULE_RANK if _MODULE_KEY.fullmatch(key) else _RANK.get(key, _MIDDLE_RANK)


def _joined_pairs(params: Mapping[str, Any]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, value in params.items():
        base, half = key[:-2], key[-2:]
        if base in PAIRED_KEYS and half in ("-1", "-2") and f"{base}-1" in params and f"{base}-2" in params:
            joined[base] = f"{params[f'{base}-1']}x{params[f'{base}-2']}"
        else:
            joined[key] = value
    return joined


def parse_infotext(text: str) -> dict[str, str]:
    """Prompt, Negative prompt and every pair of the last line, as strings; no defaults.

    `WxH` values become `Key-1` and `Key-2`. A text without a line of at least three pairs is all prompt.
    """
    prompt_lines, parameter_lines = _split_parameter_lines(_lines(text))
    prompt, negative_prompt = _split_prompts(prompt_lines)
    parsed = {"Prompt": prompt, "Negative prompt": negative_prompt}
    for line in parameter_lines:
        for key, value in iterate_pairs(line):
            size = _WIDTH_X_HEIGHT.fullmatch(value)
            if size:
                parsed[f"{key}-1"], parsed[f"{key}-2"] = size.groups()
            else:
                parsed[key] = value
    return parsed


def has_parameters(text: str) -> bool:
    """Whether `text` ends with a line of generation parameters."""
    return bool(_split_parameter_lines(_lines(text))[1])


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").strip().split("\n")


def _split_parameter_lines(lines: list[str]) -> tuple[list[str], list[str]]:
    """(prompt lines, the parameter line if any). That is the last line starting with Steps, because extensions append their templates after it,
    weights included; if none does, the very last line.
    """
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].lstrip().startswith(_STEPS_FIRST) and _counts_as_parameters(lines[index]):
            return lines[:index], [lines[index]]
    return (lines[:-1], lines[-1:]) if _counts_as_parameters(lines[-1]) else (lines, [])


def _counts_as_parameters(line: str) -> bool:
    """Whether the line has enough pairs outside brackets; `(tag:1.2)` or `<lora:a:1>` inside brackets is prompt text."""
    if line.lstrip().startswith(NEGATIVE_PREFIX):
        return False
    return sum(1 for _ in zip(_plain_pairs(line), range(MINIMUM_PAIRS))) == MINIMUM_PAIRS


def _plain_pairs(line: str) -> Iterator[_Pair]:
    """Pairs at the start of the line or after a comma. Unknown keys count only outside brackets and with a space after the colon."""
    depth = position = 0
    for pair in _pairs(line):
        depth = _depth_behind(line[position : pair.key_start], depth)
        before = line[position : pair.key_start].rsplit(",", 1)[-1]
        has_blank = line[pair.colon + 1 : pair.colon + 2].isspace()
        if not before.strip() and (pair.key in _KNOWN_KEYS or (depth == 0 and has_blank)):
            yield pair
        elif depth or before.strip():
            depth = _depth_behind(line[pair.key_start : pair.end], depth)
        position = pair.end


def _depth_behind(text: str, depth: int) -> int:
    """How many brackets are open after `text` if `depth` are open before it. Unmatched closing brackets do not count."""
    for char in text:
        depth = depth + 1 if char in _OPENING else max(0, depth - 1) if char in _CLOSING else depth
    return depth


def _split_prompts(lines: Iterable[str]) -> tuple[str, str]:
    prompt: list[str] = []
    negative: list[str] = []
    in_negative = False
    for line in lines:
        if line.lstrip().startswith(NEGATIVE_PREFIX):
            in_negative = True
            line = line.lstrip()[len(NEGATIVE_PREFIX) :].lstrip()
        (negative if in_negative else prompt).append(line)
    return "\n".join(prompt).strip(), "\n".join(negative).strip()


def iterate_pairs(line: str) -> Iterator[tuple[str, str]]:
    """The `Key: value` pairs of a line, left to right, values unquoted. Parts without a key are skipped. Linear in the line's length."""
    for pair in _pairs(line):
        yield pair.key, unquote(pair.raw_value)


class _Pair(NamedTuple):
    """`end` is the position after the value's comma."""

    key: str
    raw_value: str
    key_start: int
    colon: int
    end: int


def _pairs(line: str) -> Iterator[_Pair]:
    position = 0
    while (colon := line.find(":", position)) >= 0:
        piece_start = max(position, line.rfind(",", position, colon) + 1)
        key = _key_at_end(line[max(piece_start, colon - _LONGEST_KEY) : colon])
        if not key:
            position = colon + 1
            continue
        value, position = _read_value(line, colon + 1)
        yield _Pair(key, value, colon - len(key), colon, position)


def _key_at_end(text: str) -> str:
    """The key at the end of `text`: a letter or digit, then one or more of letters, digits, spaces, hyphens and slashes. Else ""."""
    behind = _KEY_BACKWARDS.match(text[::-1])
    key = text[len(text) - behind.end() :].lstrip(" -/") if behind else ""
    return key if len(key) > 1 else ""


def _read_value(line: str, start: int) -> tuple[str, int]:
    """The raw value starting at `start`, and the position after its comma."""
    while start < len(line) and line[start].isspace():
        start += 1
    quoted = _QUOTED_VALUE.match(line, start)
    if quoted and (quoted.end() == len(line) or line[quoted.end()] == ","):
        return quoted.group(), quoted.end() + 1
    end = _end_of_json(line, start)
    if end is None:
        comma = line.find(",", start)
        end = len(line) if comma < 0 else comma
    return line[start:end], end + 1


def _end_of_json(line: str, start: int) -> int | None:
    """The end of an unquoted JSON list or object starting at `start` (Civitai writes these); None if there is none."""
    if not line.startswith(("[", "{"), start):
        return None
    try:
        _, end = _JSON.raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    return end if end == len(line) or line[end] == "," else None
