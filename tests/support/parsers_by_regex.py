"""The program's text parsers as one regular expression or loop each: short enough to be obviously correct, and slow for long hostile text.

References for short texts; the linear parsers must agree.
"""

from __future__ import annotations

import math
import re

from backend.text_processing.parsing import BREAK, Span
from modules.infotext.text import unquote

_TOKEN = re.compile(
    r"(?P<escape>\\[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])|(?P<text>[^\\()\[\]:]+|:)"
)


def attention(text: str) -> list[Span]:
    spans: list[Span] = []
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for token in _TOKEN.finditer(text):
        if token.lastgroup == "open":
            open_at[token[0]].append(len(spans))
        elif token.lastgroup == "weight" and open_at["("] and math.isfinite(float(token["weight"])):
            scale(open_at["("].pop(), float(token["weight"]))
        elif token[0] == ")" and open_at["("]:
            scale(open_at["("].pop(), 1.1)
        elif token[0] == "]" and open_at["["]:
            scale(open_at["["].pop(), 1 / 1.1)
        else:
            added = [Span(token[0][1:])] if token.lastgroup == "escape" else breaks(token[0])
            spans += added
            weights += [1.0] * len(added)
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in open_at[bracket]:
            scale(start, factor)
    joined: list[Span] = []
    for span, weight in zip(spans, weights):
        weight = weight if math.isfinite(weight) else 1.0
        if span.is_break:
            joined.append(span)
        elif joined and not joined[-1].is_break and joined[-1].weight == weight:
            joined[-1] = Span(joined[-1].text + span.text, weight)
        else:
            joined.append(Span(span.text, weight))
    return joined or [Span("")]


def breaks(text: str) -> list[Span]:
    parts = re.split(r"\s*\bBREAK\b\s*", text)
    return [span for part in parts for span in (BREAK, Span(part))][1:]


def extra_networks(text: str) -> tuple[str, dict[str, list[list[str]]]]:
    found: dict[str, list[list[str]]] = {}
    pattern = re.compile(r"<(\w+):([^>]+)>")
    for match in pattern.finditer(text):
        found.setdefault(match[1], []).append(match[2].split(":"))
    return pattern.sub("", text), found


def token_arguments(token: str) -> tuple[str, list[str]]:
    arguments: list[str] = []
    while match := re.fullmatch(r"(.*)<([^>]*)>", token, re.DOTALL):
        token = match[1]
        arguments.insert(0, match[2])
    return token, arguments


def comments(text: str) -> str:
    return re.sub(r"\n?#[^\n]*(?:\n|$)", "\n", text)


def pairs(line: str) -> list[tuple[str, str]]:
    """The pairs of a line; a key's first letter may follow a comma directly, so what A1111's expression finds is searched piece by piece."""
    found, position = [], 0
    pattern = re.compile(r'(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"(?=,|$)|[^,]*)(?:,|$)')
    while match := pattern.search(line, position):
        found.append((match[1], unquote(match[2])))
        position = match.end()
    return found
