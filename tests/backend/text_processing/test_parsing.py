from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.text_processing.parsing import BREAK, Span, parse_prompt_attention

# The meaning of each in A1111.
KNOWN = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    r"a \\ b": [("a \\ b", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "a) b]": [("a) b]", 1.0)],
    "a:1.2) b": [("a:1.2) b", 1.0)],
    "(a:-0.5)": [("a", -0.5)],
    "(a : 1.5 )": [("a ", 1.5)],
    "(a:.5)": [("a", 0.5)],
    "12:30 (red:1.)": [("12:30 ", 1.0), ("red", 1.0)],
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_prompts(text: str) -> None:
    spans = parse_prompt_attention(text)
    joined = KNOWN[text] if text != "12:30 (red:1.)" else [("12:30 red", 1.0)]
    assert [(span.text, span.weight) for span in spans] == joined


@pytest.mark.parametrize("weight", ["1.2.3", ".", "1..2", "9" * 400, "nan", "--1"])
def test_non_numbers_are_text(weight: str) -> None:
    spans = parse_prompt_attention(f"(a:{weight}) b")
    assert f":{weight}" in "".join(span.text for span in spans)
    assert spans[0].weight == 1.1


def test_break_splits_and_takes_its_blanks_along() -> None:
    assert parse_prompt_attention("a cat BREAK\n a dog") == [Span("a cat"), BREAK, Span("a dog")]
    assert parse_prompt_attention("BREAK BREAK") == [Span(""), BREAK, Span(""), BREAK, Span("")]
    assert parse_prompt_attention("BREAKFAST") == [Span("BREAKFAST")]


def test_break_inside_weighted_brackets_is_still_a_break() -> None:
    assert parse_prompt_attention("(a BREAK b:1.2)") == [Span("a", 1.2), BREAK, Span("b", 1.2)]


def test_mode_none_reads_brackets_as_text_but_knows_break() -> None:
    assert parse_prompt_attention("(a:1.2) BREAK [b]", "None") == [Span("(a:1.2)"), BREAK, Span("[b]")]


def test_thousands_of_brackets_stay_finite() -> None:
    assert all(math.isfinite(span.weight) for span in parse_prompt_attention("(" * 9000 + "a"))


def plain_words() -> st.SearchStrategy[str]:
    return st.text("abc ,.é", min_size=1, max_size=8)


def test_spans_written_out_are_read_again() -> None:
    @given(st.lists(st.tuples(plain_words(), st.integers(-300, 300)), min_size=1, max_size=8))
    def check(parts: list[tuple[str, int]]) -> None:
        weighted = [(text, hundredths / 100) for text, hundredths in parts]
        text = "".join(f"({text}:{weight})" for text, weight in weighted)
        expected: list[tuple[str, float]] = []
        for words, weight in weighted:
            if expected and expected[-1][1] == weight:
                expected[-1] = (expected[-1][0] + words, weight)
            else:
                expected.append((words, weight))
        assert [(span.text, span.weight) for span in parse_prompt_attention(text)] == expected

    check()


@given(st.text(st.one_of(st.sampled_from("()[]:\\.0123456789- BREAK"), st.characters()), max_size=60))
def test_any_text_is_read_and_no_letter_is_lost(text: str) -> None:
    spans = parse_prompt_attention(text)
    assert spans and all(math.isfinite(span.weight) for span in spans)
    letters = [char for char in text.replace("BREAK", "") if char.isalpha()]
    assert [char for span in spans if not span.is_break for char in span.text.replace("BREAK", "") if char.isalpha()] == letters
