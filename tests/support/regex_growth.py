"""Proves that a regular expression matches in linear time, by searching for two ways to read the same text that a failing match would both try.

A backtracking engine takes time n^2 or more for texts of length n exactly if the expression's automaton has states p != q and a text v with
p -v-> p, p -v-> q and q -v-> q (Weber and Seidl 1991, "On the degree of ambiguity of finite automata"): repetitions of v can be split in n places.
If the match may end in q, the engine stops there and tries no other split. `search`, `sub`, `split` and `finditer` behave as if any text came
before. Assertions only narrow what matches: boundaries and anchors count as possible, lookahead as consumed, and since they may fail, no match of
an expression with one counts as certain. So this finds too much rather than too little.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

_IS_IN_RE = sys.version_info >= (3, 11)
codes: Any = importlib.import_module("re._constants" if _IS_IN_RE else "sre_constants")
parser: Any = importlib.import_module("re._parser" if _IS_IN_RE else "sre_parse")
compiler: Any = importlib.import_module("re._compiler" if _IS_IN_RE else "sre_compile")

LETTERS = tuple(map(chr, range(128))) + ("\xa0", "\u0660", "\xb2", "\xe9", "\u6f22")
"""ASCII, a space, a digit, a digit that is not decimal, letters: every class in our expressions includes some and excludes some."""
_LARGEST_COPIED_REPEAT = 3


@dataclass
class _Automaton:
    """Epsilon-free once `closed`; state 0 is the start, `accepting` are the states that reach the end without a letter."""

    letters: list[list[tuple[frozenset[str], int]]] = field(default_factory=list)
    skips: list[list[int]] = field(default_factory=list)

    def add(self) -> int:
        self.letters.append([])
        self.skips.append([])
        return len(self.letters) - 1

    def closure(self, state: int) -> Counter[int]:
        """State -> number of ways to reach it without a letter."""
        found: Counter[int] = Counter()
        waiting: list[tuple[int, ...]] = [(state,)]
        while waiting:
            path = waiting.pop()
            found[path[-1]] += 1
            waiting += [(*path, follower) for follower in self.skips[path[-1]] if follower not in path]
        return found


def _members(operator: Any, argument: Any, flags: int) -> frozenset[str]:
    """The letters matched by one set, literal or class, according to the engine itself."""
    state = parser.State()
    state.flags, state.str = flags, ""
    one = parser.SubPattern(state, [(operator, argument)])
    compiled = compiler.compile(one, flags)
    return frozenset(letter for letter in LETTERS if compiled.fullmatch(letter))


_ONE_LETTER = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_REPEATS = {code for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if (code := getattr(codes, name, None)) is not None}


def _build(automaton: _Automaton, items: Iterable[tuple[Any, Any]], start: int, flags: int) -> int:
    """Append what `items` match after `start`; returns the final state."""
    for operator, argument in items:
        if operator in _ONE_LETTER:
            end = automaton.add()
            automaton.letters[start].append((_members(operator, argument, flags), end))
            start = end
        elif operator is codes.BRANCH:
            end = automaton.add()
            for branch in argument[1]:
                automaton.skips[_build(automaton, branch, start, flags)].append(end)
            start = end
        elif operator is codes.SUBPATTERN:
            start = _build(automaton, argument[3], start, (flags | argument[1]) & ~argument[2])
        elif operator in _REPEATS:
            start = _repeat(automaton, argument, start, flags)
        elif operator is codes.ASSERT and argument[0] > 0:
            start = _build(automaton, argument[1], start, flags)
        elif operator not in (codes.AT, codes.ASSERT, codes.ASSERT_NOT):
            raise NotImplementedError(f"{operator} is not judged here")
    return start


def _repeat(automaton: _Automaton, argument: tuple[int, int, Any], start: int, flags: int) -> int:
    low, high, body = argument
    for _ in range(min(low, _LARGEST_COPIED_REPEAT)):
        start = _build(automaton, body, start, flags)
    if high == codes.MAXREPEAT:
        loop = automaton.add()
        automaton.skips[start].append(loop)
        automaton.skips[_build(automaton, body, loop, flags)].append(loop)
        return loop
    end = automaton.add()
    automaton.skips[start].append(end)
    for _ in range(min(high - low, _LARGEST_COPIED_REPEAT)):
        start = _build(automaton, body, start, flags)
        automaton.skips[start].append(end)
    return end


def superlinear_text(pattern: str, flags: int = 0, use: str = "search") -> str | None:
    """A text whose repetition takes more than linear time, or None. `use`: "search", "match" or "fullmatch"."""
    tree = parser.parse(pattern, flags)
    automaton = _Automaton()
    start = automaton.add()
    if use == "search":
        automaton.letters[start].append((frozenset(LETTERS), start))
    begin = automaton.add()
    automaton.skips[start].append(begin)
    end = _build(automaton, tree, begin, tree.state.flags)
    closures = [automaton.closure(state) for state in range(len(automaton.letters))]
    moves = [[(letters, to) for near in closures[state] for letters, to in automaton.letters[near]] for state in range(len(closures))]
    may_fail_at_its_end = use == "fullmatch" or any(name in repr(tree) for name in ("(AT, AT_END", "(AT, AT_BOUNDARY", "(AT, AT_NON", "(ASSERT"))
    accepting = set() if may_fail_at_its_end else {state for state in range(len(closures)) if end in closures[state]}
    return _twofold_letter(automaton, closures, moves) or _ambiguous_text(moves, accepting)


def _twofold_letter(automaton: _Automaton, closures: list[Counter[int]], moves: list[list[tuple[frozenset[str], int]]]) -> str | None:
    """A letter that a loop matches in two ways that differ only in what they skip: time 2^n."""
    for state, closure in enumerate(closures):
        for near, ways in closure.items():
            for letters, to in automaton.letters[near] if ways > 1 else ():
                if letters and (to == state or any(back == state for _, back in _reached(moves, to))):
                    return min(letters)
    return None


def _ambiguous_text(moves: list[list[tuple[frozenset[str], int]]], accepting: set[int]) -> str | None:
    """v with p -v-> p, p -v-> q, q -v-> q for some p != q where no match may end."""
    looping = [state for state in range(len(moves)) if any(to == state for _, to in _reached(moves, state))]
    for p, q in product(looping, looping):
        if p != q and q not in accepting and any(to == q for _, to in _reached(moves, p)) and (text := _joint_text(moves, p, q)) is not None:
            return text
    return None


def _reached(moves: list[list[tuple[frozenset[str], int]]], state: int) -> list[tuple[int, int]]:
    seen, waiting = set(), [state]
    while waiting:
        for letters, to in moves[waiting.pop()]:
            if letters and to not in seen:
                seen.add(to)
                waiting.append(to)
    return [(state, to) for to in seen]


def _joint_text(moves: list[list[tuple[frozenset[str], int]]], p: int, q: int) -> str | None:
    """The shortest text leading from (p, p, q) to (p, q, q)."""
    texts, waiting = {(p, p, q): ""}, [(p, p, q)]
    for state in waiting:
        for (first, a), (second, b), (third, c) in product(*(moves[one] for one in state)):
            shared = first & second & third
            if not shared:
                continue
            text = texts[state] + min(shared)
            if (a, b, c) == (p, q, q):
                return text
            if (a, b, c) not in texts:
                texts[a, b, c] = text
                waiting.append((a, b, c))
    return None
