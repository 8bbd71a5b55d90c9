"""Splits prompts joined by AND, each with a weight, and strips comments. Pure text. Must not know schedules or models."""

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
    """The parts between ANDs. A part that ends in ":" and a number has that weight, otherwise 1. A prompt without AND is one part.

    Spaces before AND, before the weight and at the end are removed; those after AND stay.
    """
    return [_split_weight(part) for part in _AND.split(prompt)]


def _split_weight(part: str) -> Subprompt:
    text, colon, tail = part.rpartition(":")
    number = _WEIGHT.fullmatch(tail) if colon else None
    weight = float(number[1]) if number else math.inf
    return Subprompt(text.rstrip(), weight) if math.isfinite(weight) else Subprompt(part.rstrip(), 1.0)


def strip_comments(text: str) -> str:
    """The prompt without comments: a `#` and the rest of its line."""
    return _COMMENT.sub("\n", text)
