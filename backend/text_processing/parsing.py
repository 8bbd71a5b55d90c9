"""Emphasis in prompts: `(a)`, `(a:1.3)`, `[a]`, escapes and BREAK, as weighted spans of text.

Pure text in, plain values out. Must not know tokens, tensors or prompt schedules: a schedule has been resolved before its text comes here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

ROUND_BRACKET_WEIGHT = 1.1
SQUARE_BRACKET_WEIGHT = 1 / 1.1

_TOKEN = re.compile(
    r"""
    (?P<escape> \\ [()\[\]\\]? )                            # a lone backslash escapes nothing and vanishes
  | (?P<open> [(\[] )
  | : \s* (?P<weight> [+-]? (?: \d+\.?\d* | \.\d+ ) ) \s* \)  # ":1.3)" closes a round bracket with a weight
  | (?P<close> [)\]] )
  | (?P<text> [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text with one weight; or, with `is_break`, the place where a new chunk begins."""

    text: str
    weight: float = 1.0
    is_break: bool = False


BREAK = Span("BREAK", -1.0, is_break=True)


def parse_prompt_attention(text: str, emphasis: str = "Original") -> list[Span]:
    """The spans of `text` in order, neighbours of equal weight joined; never empty.

    Round brackets multiply by 1.1 or by the weight they name, square brackets divide by 1.1, nesting multiplies. A bracket left open reaches to
    the end; one that closes nothing is text. With the emphasis mode "None" only BREAK means anything.
    """
    if emphasis == "None":
        return _split_at_breaks(text)
    reader = _EmphasisReader()
    for token in _TOKEN.finditer(text):
        reader.take(token)
    return _join_equal_weights(reader.finish()) or [Span("")]


class _EmphasisReader:
    """Collects spans and their weights; remembers at which span each open bracket began."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.weights: list[float] = []
        self.open_at: dict[str, list[int]] = {"(": [], "[": []}

    def take(self, token: re.Match[str]) -> None:
        kind, text = token.lastgroup, token[0]
        if kind == "escape":
            self._add(Span(text[1:]))
        elif kind == "open":
            self.open_at[text].append(len(self.spans))
        elif kind == "weight" and self.open_at["("] and math.isfinite(weight := float(token["weight"])):
            self._scale_from(self.open_at["("].pop(), weight)
        elif text == ")" and self.open_at["("]:
            self._scale_from(self.open_at["("].pop(), ROUND_BRACKET_WEIGHT)
        elif text == "]" and self.open_at["["]:
            self._scale_from(self.open_at["["].pop(), SQUARE_BRACKET_WEIGHT)
        else:
            self._add(*_split_at_breaks(text))

    def finish(self) -> list[Span]:
        for start in self.open_at["("]:
            self._scale_from(start, ROUND_BRACKET_WEIGHT)
        for start in self.open_at["["]:
            self._scale_from(start, SQUARE_BRACKET_WEIGHT)
        return [span if span.is_break else Span(span.text, _finite(weight)) for span, weight in zip(self.spans, self.weights)]

    def _add(self, *spans: Span) -> None:
        self.spans += spans
        self.weights += [1.0] * len(spans)

    def _scale_from(self, start: int, factor: float) -> None:
        for index in range(start, len(self.weights)):
            self.weights[index] *= factor


def _finite(weight: float) -> float:
    """Thousands of nested brackets overflow; such a weight says nothing."""
    return weight if math.isfinite(weight) else 1.0


def _split_at_breaks(text: str) -> list[Span]:
    parts = _BREAK.split(text)
    spans = [Span(parts[0])]
    for part in parts[1:]:
        spans += [BREAK, Span(part)]
    return spans


def _join_equal_weights(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and not last.is_break and not span.is_break and last.weight == span.weight:
            joined[-1] = Span(last.text + span.text, last.weight)
        else:
            joined.append(span)
    return joined
