"""Prompts joined by AND, each with a weight, and prompts with comments. Pure text. Must not know schedules or models."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")
_COMMENT = re.compile(r"\n?#[^\n]*\n?")


class Subprompt(NamedTuple):
    text: str
    weight: float


def split_composition(prompt: str) -> list[Subprompt]:
    """The parts between ANDs. A part that ends in ":" and a number has that weight, else 1; a prompt without AND is one part.

    Blanks before AND, the weight and the end are cut; those after AND stay.
    """
    return [_split_weight(part) for part in _AND.split(prompt)]


def _split_weight(part: str) -> Subprompt:
    text, colon, tail = part.rpartition(":")
    number = _WEIGHT.fullmatch(tail) if colon else None
    weight = float(number[1]) if number else math.inf
    return Subprompt(text.rstrip(), weight) if math.isfinite(weight) else Subprompt(part.rstrip(), 1.0)


def strip_comments(text: str) -> str:
    """The prompt without what follows a `#` on its line."""
    return _COMMENT.sub("\n", text)
