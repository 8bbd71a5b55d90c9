"""The text form of generation parameters that users paste: building it and reading it back.

    a prompt, any number of lines
    Negative prompt: any number of lines
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Hires prompt: "quoted, because of the comma"

Pure text work. Must not know settings, images, gradio or the engine (modules/infotext_utils.py joins it with those).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NEGATIVE_PREFIX = "Negative prompt:"
MINIMUM_PAIRS = 3
"""A last line with fewer `Key: value` pairs belongs to the prompt."""

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
"""Keys whose `WxH` value is read as `Key-1` and `Key-2`."""

_KEY_AT_END = re.compile(r"\w[\w \-/]+$")
_QUOTED_VALUE = re.compile(r'"(?:\\.|[^\\"])+"')
_WIDTH_X_HEIGHT = re.compile(r"(\d+)x(\d+)")
_MODULE_KEY = re.compile(r"Module \d+")
_LONGEST_KEY = 200
_JSON = json.JSONDecoder()


def quote(value: object) -> str:
    """`value` as it stands after the colon: JSON-quoted where a comma, colon, newline, leading quote or outer space would be misread."""
    text = str(value)
    ambiguous = any(char in text for char in ",:\n\r") or text.startswith('"') or text != text.strip()
    return json.dumps(text, ensure_ascii=False) if ambiguous else text


def unquote(text: str) -> str:
    """The inverse of quote(); text that is not a JSON string stays as it is."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def build_infotext(prompt: str, negative_prompt: str, params: Mapping[str, Any]) -> str:
    """The text of one picture. Pairs whose value is None are left out; the order of the last line is the one users know.

    `Size-1` and `Size-2` (as parsing returns them) are written as `Size: WxH`.
    """
    lines = [_one_text(prompt)]
    if negative_prompt:
        lines.append(f"{NEGATIVE_PREFIX} {_one_text(negative_prompt)}")
    lines.append(build_parameters_line(params))
    return "\n".join(lines)


def build_parameters_line(params: Mapping[str, Any]) -> str:
    """The `Key: value` pairs joined by comma and space. A key equal to its value prints once."""
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
    """Prompt, Negative prompt and every pair of the last line, as texts; only what is written there.

    `WxH` values become `Key-1` and `Key-2`. A text without a line of at least three pairs is all prompt.
    """
    lines = text.replace("\r\n", "\n").strip().split("\n")
    prompt_lines, parameter_lines = _split_parameter_lines(lines)
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
    """Whether `text` ends in a line of generation parameters."""
    return bool(_split_parameter_lines(text.replace("\r\n", "\n").strip().split("\n"))[1])


def _split_parameter_lines(lines: list[str]) -> tuple[list[str], list[str]]:
    if _counts_as_parameters(lines[-1]):
        return lines[:-1], lines[-1:]
    # Some writers put template lines behind the parameters; a line that begins with Steps is then the one.
    for index in range(len(lines) - 2, -1, -1):
        if lines[index].lstrip().startswith("Steps:") and _counts_as_parameters(lines[index]):
            return lines[:index], [lines[index]]
    return lines, []


def _counts_as_parameters(line: str) -> bool:
    return sum(1 for _ in zip(iterate_pairs(line), range(MINIMUM_PAIRS))) == MINIMUM_PAIRS


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
    """The `Key: value` pairs of a line, left to right; values unquoted. Pieces without a key are passed over. Linear in the line's length."""
    position = 0
    while position < len(line):
        colon, comma = line.find(":", position), line.find(",", position)
        if colon < 0:
            return
        if 0 <= comma < colon:
            position = comma + 1
            continue
        key = _KEY_AT_END.search(line[max(position, colon - _LONGEST_KEY) : colon])
        if key is None:
            position = colon + 1
            continue
        value, position = _read_value(line, colon + 1)
        yield key.group(), unquote(value)


def _read_value(line: str, start: int) -> tuple[str, int]:
    """The raw value that begins at `start`, and the position behind its comma."""
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
    """Where an unquoted JSON list or object that begins at `start` ends (Civitai writes such); None when there is none."""
    if not line.startswith(("[", "{"), start):
        return None
    try:
        _, end = _JSON.raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    return end if end == len(line) or line[end] == "," else None
