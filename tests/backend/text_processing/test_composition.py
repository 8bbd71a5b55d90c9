from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.text_processing.composition import Subprompt, split_composition, strip_comments


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog:-0.5\nAND fog: .3 ", [("a cat", 1.2), (" a dog", -0.5), (" fog", 0.3)]),
        ("a cat : +2. AND b", [("a cat", 2.0), (" b", 1.0)]),
        ("SAND ANDROID and AND_", [("SAND ANDROID and AND_", 1.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("time 12:30", [("time 12", 30.0)]),
        ("[a:b:0.5]", [("[a:b:0.5]", 1.0)]),
        ("(a:1.2)", [("(a:1.2)", 1.0)]),
        ("a:1:2", [("a:1", 2.0)]),
        ("a:1.2.3", [("a:1.2.3", 1.0)]),
        ("a:", [("a:", 1.0)]),
        ("", [("", 1.0)]),
        (f"a:{'9' * 400}", [(f"a:{'9' * 400}", 1.0)]),
    ],
)
def test_parts_and_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert split_composition(prompt) == [Subprompt(*part) for part in parts]


@given(st.lists(st.tuples(st.text("ab ()[]\n", max_size=9), st.integers(-400, 400)), min_size=1, max_size=5))
def test_parts_written_out_are_read_again(parts: list[tuple[str, int]]) -> None:
    prompt = " AND ".join(f"{text} :{hundredths / 100}" for text, hundredths in parts)
    found = split_composition(prompt)
    assert [(part.text.strip(), part.weight) for part in found] == [(text.strip(), hundredths / 100) for text, hundredths in parts]


@given(st.text())
def test_any_text_is_split(prompt: str) -> None:
    assert len(split_composition(prompt)) >= 1


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a cat", "a cat"),
        ("a cat # not a dog", "a cat \n"),
        ("# title\na cat\n# end\n", "\na cat\n"),
        ("a # x\nb # y\nc", "a \nb \nc"),
        ("#", "\n"),
    ],
)
def test_comments_go_to_the_end_of_their_line(text: str, stripped: str) -> None:
    assert strip_comments(text) == stripped
