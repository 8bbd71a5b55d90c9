"""Parses emphasis in prompts: `(a)`, `(a:1.3)`, `[a]`, escapes and BREAK, into weighted spans of text.

Pure text in, plain values out. Must not know tokens, tensors or prompt schedules: schedules are resolved before this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

ROUND_BRACKET_WEIGHT = 1.1
SQUARE_BRACKET_WEIGHT = 1 / 1.1
MAX_ORDERED_FACTORS = 16
"""With up to this many brackets around a text, its weight is their product in the order they close, rounding included. Deeper nesting is multiplied
from the outside in, which can be done once for all texts inside."""

_TOKEN = re.compile(
    r"""
    (?P<escape> \\ [()\[\]\\]? )                              # a lone backslash escapes nothing and is dropped
  | (?P<open> [(\[] )
  | : \s* (?P<weight> [+-]? (?: \d+ (?: \.\d* )? | \.\d+ ) ) \s* \)  # ":1.3)" closes a round bracket with a weight
  | (?P<close> [)\]] )
  | (?P<text> [^\\()\[\]:]+ | : )
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of text with one weight; with `is_break`, the point where a new chunk begins."""

    text: str
    weight: float = 1.0
    is_break: bool = False


BREAK = Span("BREAK", -1.0, is_break=True)


def parse_prompt_attention(text: str, emphasis: str = "Original") -> list[Span]:
    """The spans of `text` in order, never empty, with neighbors of equal weight joined. Linear in the length of `text`, however deep brackets nest.

    Round brackets multiply by 1.1 or by their explicit weight, square brackets divide by 1.1, and nesting multiplies. An unclosed bracket extends to
    the end; a bracket that closes nothing is text. With the emphasis mode "None" only BREAK has a meaning.
    """
    if emphasis == "None":
        return _split_at_breaks(text)
    reader = _EmphasisReader()
    for token in _TOKEN.finditer(text):
        reader.take(token)
    return _join_equal_weights(reader.finish()) or [Span("")]


@dataclass(slots=True, eq=False)
class _Bracket:
    """An opened bracket. `around` is the next enclosing bracket of its shape; `closed_at` orders brackets by when they close."""

    around: _Bracket | None
    depth: int
    factor: float = 1.0
    closed_at: int = 0
    product: float = 1.0


class _EmphasisReader:
    """Collects spans, and for each the innermost enclosing bracket of either shape. Shapes may cross: `([a)b]` weights a twice and b once."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.around: list[tuple[_Bracket | None, _Bracket | None]] = []
        self.brackets: list[_Bracket] = []
        self.num_closed = 0
        self.innermost: dict[str, _Bracket | None] = {"(": None, "[": None}

    def take(self, token: re.Match[str]) -> None:
        kind, text = token.lastgroup, token[0]
        if kind == "escape":
            self._add(Span(text[1:]))
        elif kind == "open":
            self._open(text)
        elif kind == "weight" and self.innermost["("] and math.isfinite(weight := float(token["weight"])):
            self._close("(", weight)
        elif text == ")" and self.innermost["("]:
            self._close("(", ROUND_BRACKET_WEIGHT)
        elif text == "]" and self.innermost["["]:
            self._close("[", SQUARE_BRACKET_WEIGHT)
        else:
            self._add(*_split_at_breaks(text))

    def finish(self) -> list[Span]:
        self._close_all("(", ROUND_BRACKET_WEIGHT)
        self._close_all("[", SQUARE_BRACKET_WEIGHT)
        for bracket in self.brackets:  # enclosing brackets come first
            bracket.product = bracket.factor * (bracket.around.product if bracket.around else 1.0)
        spans: list[Span] = []
        known, weight = None, 1.0
        for span, around in zip(self.spans, self.around):
            if around != known:
                known, weight = around, _finite(_weight(*around))
            spans.append(span if span.is_break else Span(span.text, weight))
        return spans

    def _add(self, *spans: Span) -> None:
        self.spans += spans
        self.around += [(self.innermost["("], self.innermost["["])] * len(spans)

    def _open(self, shape: str) -> None:
        around = self.innermost[shape]
        bracket = _Bracket(around, around.depth + 1 if around else 1)
        self.innermost[shape] = bracket
        self.brackets.append(bracket)

    def _close(self, shape: str, factor: float) -> None:
        bracket = self.innermost[shape]
        assert bracket is not None
        self.innermost[shape] = bracket.around
        self._set_factor(bracket, factor)

    def _close_all(self, shape: str, factor: float) -> None:
        """Close the unclosed brackets at the end, the outermost first."""
        for bracket in reversed(list(_chain(self.innermost[shape]))):
            self._set_factor(bracket, factor)

    def _set_factor(self, bracket: _Bracket, factor: float) -> None:
        self.num_closed += 1
        bracket.factor, bracket.closed_at = factor, self.num_closed


def _chain(bracket: _Bracket | None) -> Iterator[_Bracket]:
    """A bracket and the enclosing ones of its shape, from the inside out."""
    while bracket is not None:
        yield bracket
        bracket = bracket.around


def _weight(round_one: _Bracket | None, square_one: _Bracket | None) -> float:
    """The product of all factors around a text. See MAX_ORDERED_FACTORS."""
    if sum(bracket.depth for bracket in (round_one, square_one) if bracket) > MAX_ORDERED_FACTORS:
        return math.prod(bracket.product for bracket in (round_one, square_one) if bracket)
    around = sorted((*_chain(round_one), *_chain(square_one)), key=lambda bracket: bracket.closed_at)
    return math.prod((bracket.factor for bracket in around), start=1.0)


def _finite(weight: float) -> float:
    """The weight, or 1 if thousands of nested brackets made it overflow."""
    return weight if math.isfinite(weight) else 1.0


def _split_at_breaks(text: str) -> list[Span]:
    """`text` split at each BREAK, without the spaces around it."""
    first, *others = _BREAK.split(text)
    if not others:
        return [Span(text)]
    spans = [Span(first.rstrip())]
    for part in others[:-1]:
        spans += [BREAK, Span(part.strip())]
    return [*spans, BREAK, Span(others[-1].lstrip())]


def _join_equal_weights(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for (is_break, weight), run in groupby(spans, key=lambda span: (span.is_break, span.weight)):
        alike = list(run)
        joined += alike if is_break else [Span("".join([span.text for span in alike]), weight)]
    return joined
