"""Prompts that change during sampling: `[before:after:when]`, `[after:when]`, `[before::when]`, `[a|b|c]`.

A prompt is parsed into a tree that can be written back exactly and evaluated at a step. Malformed syntax is text, exactly as in A1111: an unbalanced
bracket or a stray colon, and everything around them, is text; a stray `|` or backslash makes the whole prompt text. Must not know what brackets mean
for emphasis, nor tokens or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeAlias, cast

from lark import Lark, Token, Tree
from lark.lark import PostLex

MAX_DEPTH = 100
"""A prompt with deeper nesting is treated as text."""
MAX_KEPT_CHARS = 10_000
"""Trees of longer prompts are not cached, so that a client cannot fill memory."""

GRAMMAR = r"""
    start: _item*
    _item: TEXT | STRAY | COLON | BAR | LONE_BACKSLASH | round | square
    round: _ROUND_OPEN _item* _ROUND_CLOSE
    square: _SQUARE_OPEN _item* _SQUARE_CLOSE

    TEXT.2: /([^\\\[\]():|]|\\.)+/
    LONE_BACKSLASH: "\\"
    COLON: ":"
    BAR: "|"
    _ROUND_OPEN: "("
    _ROUND_CLOSE: ")"
    _SQUARE_OPEN: "["
    _SQUARE_CLOSE: "]"
    %declare STRAY
"""

_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")


# the tree


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Brackets:
    """Emphasis brackets, which stay in the text, around a prompt that may change. `kind` is "()" or "[]"."""

    kind: str
    content: Prompt


@dataclass(frozen=True, slots=True)
class Switch:
    """`[before:after:when]`; `before` is None for `[after:when]`. `when` is as written, including spaces."""

    before: Prompt | None
    after: Prompt
    when: str


@dataclass(frozen=True, slots=True)
class Alternation:
    """`[a|b|c]`: one option per step, in turn."""

    options: tuple[Prompt, ...]


Node: TypeAlias = Text | Brackets | Switch | Alternation
Prompt: TypeAlias = tuple[Node, ...]


def write_prompt(prompt: Prompt) -> str:
    """The prompt as it was written."""
    return "".join(_write_node(node) for node in prompt)


def _write_node(node: Node) -> str:
    if isinstance(node, Text):
        return node.text
    if isinstance(node, Brackets):
        return f"{node.kind[0]}{write_prompt(node.content)}{node.kind[1]}"
    if isinstance(node, Alternation):
        return f"[{'|'.join(write_prompt(option) for option in node.options)}]"
    before = "" if node.before is None else f"{write_prompt(node.before)}:"
    return f"[{before}{write_prompt(node.after)}:{node.when}]"


# steps


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSteps:
    """Which steps a `when` counts: those of the first pass or, with `num_hires_steps`, those of the hires pass.

    In the first pass 0.5 means half of its steps and 7 its 7th step. In the hires pass fractions run from 1 to 2, and integers continue after the
    first pass's last step. The old scheduling knows only one pass and treats every number below 1 as a fraction.
    """

    num_base_steps: int
    num_hires_steps: int | None = None
    use_old_scheduling: bool = False

    @property
    def num_steps(self) -> int:
        return self.num_base_steps if self._is_first_pass else cast(int, self.num_hires_steps)

    @property
    def _is_first_pass(self) -> bool:
        return self.num_hires_steps is None or self.use_old_scheduling

    def switch_step(self, when: str) -> int:
        """The last step before the switch; 0 if it happens before the pass begins."""
        number = float(when)
        if self.use_old_scheduling:
            step = number * self.num_steps if number < 1 else number
        elif "." in when:
            step = (number if self._is_first_pass else number - 1.0) * self.num_steps
        else:
            step = number if self._is_first_pass else number - self.num_base_steps
        return math.trunc(min(max(step, 0.0), self.num_steps))


def schedule_prompt(text: str, steps: PassSteps) -> list[tuple[int, str]]:
    """[(last step, text), ...] in order of steps, counted from 1. The last entry ends with the pass. Accepts any text without raising."""
    prompt = parse_prompt(text)
    texts: dict[str, str] = {}  # repeated texts share memory
    schedule = []
    for last_step in sorted({steps.num_steps, *_change_steps(prompt, steps)}):
        text_at_step = "".join(_text_at(prompt, last_step, steps))
        schedule.append((last_step, texts.setdefault(text_at_step, text_at_step)))
    return schedule


def _change_steps(prompt: Prompt, steps: PassSteps) -> Collection[int]:
    """The last step before each change anywhere in the prompt: every step if there is an alternation."""
    found: set[int] = set()
    for node in _all_nodes(prompt):
        if isinstance(node, Alternation):
            return range(1, steps.num_steps + 1)
        if isinstance(node, Switch) and (step := steps.switch_step(node.when)) >= 1:
            found.add(step)
    return found


def _all_nodes(prompt: Prompt) -> Iterator[Node]:
    """The nodes of a prompt and of all nested prompts."""
    waiting = [*prompt]
    while waiting:
        node = waiting.pop()
        yield node
        for part in _parts(node):
            waiting += part


def _parts(node: Node) -> tuple[Prompt, ...]:
    if isinstance(node, Brackets):
        return (node.content,)
    if isinstance(node, Alternation):
        return node.options
    return (node.before or (), node.after) if isinstance(node, Switch) else ()


def _text_at(prompt: Prompt, step: int, steps: PassSteps) -> Iterator[str]:
    for node in prompt:
        if isinstance(node, Text):
            yield node.text
        elif isinstance(node, Brackets):
            yield from (node.kind[0], *_text_at(node.content, step, steps), node.kind[1])
        elif isinstance(node, Alternation):
            yield from _text_at(node.options[(step - 1) % len(node.options)], step, steps)
        else:
            yield from _text_at((node.before or ()) if step <= steps.switch_step(node.when) else node.after, step, steps)


# parsing


class _AllText(Exception):
    """The prompt has a stray mark, so all of it is text."""


def parse_prompt(text: str) -> Prompt:
    """The tree of a prompt. `write_prompt` always restores `text` exactly. Linear in the length of `text`."""
    return _known_prompt(text) if len(text) <= MAX_KEPT_CHARS else _parse(text)


@lru_cache(maxsize=512)
def _known_prompt(text: str) -> Prompt:
    return _parse(text)


def _parse(text: str) -> Prompt:
    try:
        return _read_prompt(_grammar().parse(text).children)[0]
    except _AllText:
        return (Text(text),)


@cache
def _grammar() -> Lark:
    return Lark(GRAMMAR, parser="lalr", lexer="basic", postlex=_StrayBrackets())


_Item: TypeAlias = Token | Tree[Token]


class _StrayBrackets(PostLex):
    """Turns unmatched brackets into text, so that the grammar sees only balanced ones.

    A bracket that closes another kind invalidates all open ones, because each of them would have to contain it.
    """

    always_accept = ()
    PARTNERS = {"_ROUND_CLOSE": "_ROUND_OPEN", "_SQUARE_CLOSE": "_SQUARE_OPEN"}

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        tokens = list(stream)
        stray = set(self._find_stray(tokens))
        return (Token("STRAY", str(token)) if index in stray else token for index, token in enumerate(tokens))

    def _find_stray(self, tokens: Sequence[Token]) -> Iterator[int]:
        open_at: list[int] = []
        for index, token in enumerate(tokens):
            if token.type in self.PARTNERS.values():
                open_at.append(index)
                if len(open_at) > MAX_DEPTH:
                    raise _AllText
            elif token.type in self.PARTNERS and open_at and tokens[open_at[-1]].type == self.PARTNERS[token.type]:
                open_at.pop()
            elif token.type in self.PARTNERS:
                yield from (*open_at, index)
                open_at.clear()
        yield from open_at


def _read_prompt(items: Iterable[_Item]) -> tuple[Prompt, bool]:
    """(nodes, whether they contain no stray marks and so may be part of a switch or an alternation).

    Raises:
        _AllText: there is a stray `|` or backslash.
    """
    nodes: list[Node] = []
    is_sound = True
    for item in items:
        if isinstance(item, Tree):
            group, is_group_sound = _read_round(item.children) if item.data == "round" else _read_square(item.children)
            nodes += group
            is_sound &= is_group_sound
        elif item.type in ("BAR", "LONE_BACKSLASH"):
            raise _AllText
        else:
            nodes.append(Text(str(item)))
            is_sound &= item.type == "TEXT"
    return _join_texts(nodes), is_sound


def _read_round(items: Sequence[_Item]) -> tuple[Prompt, bool]:
    """`(prompt)` or `(prompt:weight)`; the weight may itself be a prompt."""
    parts = [_read_prompt(part) for part in _split(items, "COLON")]
    nodes, is_sound = _join_parts([part for part, _ in parts]), len(parts) <= 2 and all(is_part_sound for _, is_part_sound in parts)
    return ((Brackets("()", nodes),), True) if is_sound else (_as_text("(", nodes, ")"), False)


def _read_square(items: Sequence[_Item]) -> tuple[Prompt, bool]:
    if any(isinstance(item, Token) and item.type == "BAR" for item in items):
        return (_read_alternation(items),), True
    *sections, last = _split(items, "COLON")
    if not sections:
        nodes, is_sound = _read_prompt(last)
        return ((Brackets("[]", nodes),), True) if is_sound else (_as_text("[", nodes, "]"), False)
    parts = [_read_prompt(section) for section in sections]
    if len(parts) <= 2 and all(is_part_sound for _, is_part_sound in parts) and _is_when(last):
        return (Switch(parts[0][0] if len(parts) == 2 else None, parts[-1][0], str(last[0])),), True
    return _as_text("[", _join_parts([*(part for part, _ in parts), _read_prompt(last)[0]]), "]"), False


def _read_alternation(items: Sequence[_Item]) -> Alternation:
    options = [_read_prompt(option) for option in _split(items, "BAR")]
    if not all(is_option_sound for _, is_option_sound in options):
        raise _AllText
    return Alternation(tuple(option for option, _ in options))


def _is_when(items: Sequence[_Item]) -> bool:
    return len(items) == 1 and isinstance(items[0], Token) and _WHEN.fullmatch(items[0]) is not None


def _split(items: Sequence[_Item], token_type: str) -> list[list[_Item]]:
    parts: list[list[_Item]] = [[]]
    for item in items:
        if isinstance(item, Token) and item.type == token_type:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def _join_parts(parts: Sequence[Prompt]) -> Prompt:
    nodes: list[Node] = [*parts[0]]
    for part in parts[1:]:
        nodes += (Text(":"), *part)
    return _join_texts(nodes)


def _as_text(opening: str, nodes: Prompt, closing: str) -> Prompt:
    return _join_texts([Text(opening), *nodes, Text(closing)])


def _join_texts(nodes: Iterable[Node]) -> Prompt:
    joined: list[Node] = []
    texts: list[str] = []
    for node in nodes:
        if isinstance(node, Text):
            texts.append(node.text)
            continue
        if texts:
            joined.append(Text("".join(texts)))
            texts.clear()
        joined.append(node)
    return (*joined, Text("".join(texts))) if texts else tuple(joined)
