"""Text from clients is parsed in linear time: results compared with short regular expressions, and steps counted for hostile text.

`tests/contract/test_regexes.py` proves it for regular expressions; `tools/campaign/parser_growth.py` measures seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.text_processing.composition import strip_comments
from backend.text_processing.parsing import MAX_ORDERED_FACTORS, parse_prompt_attention
from modules.infotext.text import iterate_pairs
from modules.pictures.filename_tokens import split_arguments
from modules.prompts import extra_networks
from tests.support import parsers_by_regex
from tools.campaign.parser_growth import PARSERS, hostile_texts


def texts(pieces: str, max_size: int = 14) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces.split("|")), max_size=max_size).map("".join)


@given(texts("(|)|[|]|\\|:1.3)|:|1|.5)| |BREAK|a|\n|: +2. )|\x1f|\xa0"))
def test_emphasis_is_what_its_definition_says_bit_by_bit(text: str) -> None:
    assert parse_prompt_attention(text) == parsers_by_regex.attention(text)


@given(st.integers(MAX_ORDERED_FACTORS, 60), texts("(|)|[|]|a|:0.9)"))
def test_deep_emphasis_is_the_same_product(depth: int, text: str) -> None:
    text = "(a[b" * depth + text
    expected = parsers_by_regex.attention(text)
    found = parse_prompt_attention(text)
    assert "".join(span.text for span in found) == "".join(span.text for span in expected)
    weights = [[span.weight for span in spans for _ in span.text] for spans in (found, expected)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-12)


@given(texts("<|>|:|lora|a|=| |<lora:|é"))
def test_extra_networks_are_what_the_known_expression_finds(text: str) -> None:
    rest, found = extra_networks.parse_prompt(text)
    expected_rest, expected = parsers_by_regex.extra_networks(text)
    assert (rest, {kind: [params.items for params in mentions] for kind, mentions in found.items()}) == (expected_rest, expected)


@given(texts("<|>|a|%Y"))
def test_arguments_of_tokens(text: str) -> None:
    assert split_arguments(text) == parsers_by_regex.token_arguments(text)


@given(texts("#|\n|a| |\r"))
def test_comments(text: str) -> None:
    assert strip_comments(text) == parsers_by_regex.comments(text)


@given(texts('key|a|:|,| |"|\\|-|/|x y|ab: |: "|", '))
def test_pairs_are_what_the_known_expression_finds(line: str) -> None:
    assert list(iterate_pairs(line)) == parsers_by_regex.pairs(line)


# growth


class CountedText(str):
    """A string that counts the characters searched in it."""

    searched = 0

    def find(self, sub: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        found = super().find(sub, start, len(self) if end is None else end)
        self.searched += (found if found >= 0 else len(self) if end is None else end) - start
        return found

    def rfind(self, sub: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else end % len(self) if end < 0 else end
        found = super().rfind(sub, start, end)
        self.searched += end - max(found, start)
        return found


def steps(parse: Callable[[str], Any], text: str) -> int:
    """Lines executed and characters searched while parsing `text`."""
    counted, lines = CountedText(text), 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parse(counted)
    finally:
        sys.settrace(before)
    return lines + counted.searched


@pytest.mark.parametrize("name", PARSERS)
def test_steps_grow_as_the_text_does(name: str) -> None:
    """Four times the text takes at most five times the steps, for any content (quadratic would be sixteen)."""
    parse = PARSERS[name]
    parse("a, (b:1.2) [c|d]: 1")  # warm up one-time work
    for kind, text_of in hostile_texts().items():
        short, long = steps(parse, text_of(500)), steps(parse, text_of(2000))
        assert long <= 5 * short + 2000, f"{name} of {kind}: {short} steps for 500 characters, {long} for 2000"


def test_a_reader_that_searches_again_and_again_is_found_out() -> None:
    def rescanning(text: str) -> None:
        position = 0
        while (position := text.find(":", position) + 1) > 0:
            text.find(",", position)

    assert steps(rescanning, ":" * 2000) > 10 * steps(rescanning, ":" * 500)
