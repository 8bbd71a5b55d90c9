from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.text_processing.schedule import (
    MAX_DEPTH,
    Alternation,
    Brackets,
    Node,
    PassSteps,
    Prompt,
    Switch,
    Text,
    parse_prompt,
    schedule_prompt,
    write_prompt,
)

TEN = PassSteps(num_base_steps=10)

# The meaning of each over ten steps in A1111.
KNOWN = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[fe|]male": [(step, "female" if step % 2 else "male") for step in range(1, 11)],
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
    "[a|(b:1.1)]": [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)],
    "[a::4]b": [(4, "ab"), (10, "b")],
    "[::4]b": [(4, "b"), (10, "b")],
    "[a:b:0]": [(10, "b")],
    "[a:b:-3]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:0.25] [c:d:5]": [(2, "a c"), (5, "b c"), (10, "b d")],
    "([a:b:3]:1.2)": [(3, "(a:1.2)"), (10, "(b:1.2)")],
    "(a:[1.1:1.4:0.5])": [(5, "(a:1.1)"), (10, "(a:1.4)")],
    "[[a|b]:c:2]": [(1, "a"), (2, "b"), *((step, "c") for step in range(3, 11))],
    "[a:b:2e0]": [(2, "a"), (10, "b")],
    "": [(10, "")],
    "[]()[|]": [(step, "[]()") for step in range(1, 11)],
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_prompts(text: str) -> None:
    assert schedule_prompt(text, TEN) == KNOWN[text]


LITERAL = [
    "12:30, ratio 16:9",
    "a (b [c) d]",
    "[a:b]",
    "[a:b:c]",
    "[a:b:3:4]",
    "[a:b:3 steps]",
    "[a:b:0x3]",
    "[a:(b:c:d):3]",
    "[a (b:3]",
    r"\[a:b:3\]",
    r"[a:b:3\]",
    "a | b [c:3]",
    "(a|b) [c:3]",
    "[a|b:c] [d:3]",
    "[a|(b:c:d)]",
    "[a:3] back\\",
    "[a:3] back\\\nslash",
]


@pytest.mark.parametrize("text", LITERAL)
def test_what_is_malformed_is_text(text: str) -> None:
    assert schedule_prompt(text, TEN) == [(10, text)]


def test_a_malformed_part_does_not_affect_other_parts() -> None:
    assert schedule_prompt("[a:b] [c:3] :( [d", TEN) == [(3, "[a:b]  :( [d"), (10, "[a:b] c :( [d")]
    assert schedule_prompt("[a:[b:3]:c]", TEN) == [(3, "[a::c]"), (10, "[a:b:c]")]


def test_escapes_stay_for_the_emphasis_reader() -> None:
    assert schedule_prompt(r"[a\]:b\|c\::3]", TEN) == [(3, r"a\]"), (10, r"b\|c\:")]


HIRES = PassSteps(num_base_steps=10, num_hires_steps=8)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("a [b:.5] c", [(8, "a b c")]),
        ("a [b:1.5] c", [(4, "a  c"), (8, "a b c")]),
        ("a [b:2.0] c", [(8, "a  c")]),
        ("a [b:1.0] c", [(8, "a b c")]),
        ("[a:b:9]", [(8, "b")]),
        ("[a:b:13]", [(3, "a"), (8, "b")]),
        ("[a:b:40]", [(8, "a")]),
        ("[a|b]", [(step, "a" if step % 2 else "b") for step in range(1, 9)]),
    ],
)
def test_the_hires_pass_counts_on(text: str, schedule: list[tuple[int, str]]) -> None:
    assert schedule_prompt(text, HIRES) == schedule


def test_fractions_past_one_do_nothing_in_the_first_pass() -> None:
    assert schedule_prompt("a [b:1.5]", TEN) == [(10, "a ")]


@pytest.mark.parametrize("num_hires_steps", [None, 8])
def test_old_scheduling_knows_one_pass(num_hires_steps: int | None) -> None:
    old = PassSteps(num_base_steps=10, num_hires_steps=num_hires_steps, use_old_scheduling=True)
    assert schedule_prompt("[a:b:0.5]", old) == [(5, "a"), (10, "b")]
    assert schedule_prompt("[a:b:1.0]", old) == [(1, "a"), (10, "b")]
    assert schedule_prompt("[a:b:3]", old) == [(3, "a"), (10, "b")]


@pytest.mark.parametrize("when", ["1e999", "9" * 500, "-1e999"])
def test_numbers_out_of_range_are_clamped_to_the_pass(when: str) -> None:
    assert schedule_prompt(f"[a:b:{when}]", TEN) == [(10, "b" if when.startswith("-") else "a")]


def test_deep_nesting_is_read_and_deeper_nesting_is_text() -> None:
    deep = "(" * (MAX_DEPTH - 1) + "[a:b:3]" + ")" * (MAX_DEPTH - 1)
    assert len(schedule_prompt(deep, TEN)) == 2
    for count in (MAX_DEPTH + 1, 5000):
        text = "[" * count + "a:3" + "]" * count
        assert schedule_prompt(text, TEN) == [(10, text)]


def test_a_long_prompt_is_read_in_linear_time() -> None:
    text = "a (b:1.2), [c|d], ((e)) [f:g:0.5] " * 400
    assert schedule_prompt(text, PassSteps(num_base_steps=2))[0][1].startswith("a (b:1.2), c, ((e)) f")


# parse, write, parse again


def words() -> st.SearchStrategy[str]:
    return st.text("ab ,.é\n", min_size=1, max_size=6) | st.sampled_from([r"\[", r"\)", r"a\:b", r"\|", "<lora:x>".replace(":", r"\:")])


def whens() -> st.SearchStrategy[str]:
    number = st.one_of(st.integers(-2, 25).map(str), st.floats(0, 2, allow_nan=False).map(lambda value: f"{value:.3f}"), st.just("1e1"))
    return st.tuples(st.sampled_from(["", " ", "\n "]), number, st.sampled_from(["", " "])).map("".join)


def normal(nodes: list[Node]) -> Prompt:
    """Adjacent texts joined, as the reader returns them."""
    joined: list[Node] = []
    for node in nodes:
        if isinstance(node, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + node.text)
        else:
            joined.append(node)
    return tuple(joined)


def nodes(content: st.SearchStrategy[Prompt]) -> st.SearchStrategy[Node]:
    return st.one_of(
        st.builds(Text, words()),
        st.builds(Brackets, st.sampled_from(["()", "[]"]), content),
        st.builds(lambda prompt, weight: Brackets("()", normal([*prompt, Text(f":{weight}")])), content, st.floats(0, 2).map(str)),
        st.builds(Switch, st.none() | content, content, whens()),
        st.builds(Alternation, st.lists(content, min_size=2, max_size=4).map(tuple)),
    )


def prompts() -> st.SearchStrategy[Prompt]:
    leaf = st.lists(st.builds(Text, words()), max_size=2).map(normal)
    return st.recursive(leaf, lambda content: st.lists(nodes(content), max_size=4).map(normal), max_leaves=12)


@given(prompts())
@settings(max_examples=300)
def test_a_written_tree_is_read_as_the_same_tree(prompt: Prompt) -> None:
    assert parse_prompt(write_prompt(prompt)) == prompt


ANY_TEXT = st.text(st.sampled_from("[]()[]():|\\a b3.\n") | st.characters(), max_size=40)


@given(ANY_TEXT)
@settings(max_examples=500)
def test_any_text_is_written_back_letter_by_letter(text: str) -> None:
    assert write_prompt(parse_prompt(text)) == text


@given(ANY_TEXT | prompts().map(write_prompt), st.integers(1, 30), st.none() | st.integers(1, 30), st.booleans())
@settings(max_examples=300)
def test_a_schedule_covers_the_pass_in_order(text: str, num_base_steps: int, num_hires_steps: int | None, use_old_scheduling: bool) -> None:
    steps = PassSteps(num_base_steps=num_base_steps, num_hires_steps=num_hires_steps, use_old_scheduling=use_old_scheduling)
    last_steps = [last_step for last_step, _ in schedule_prompt(text, steps)]
    assert last_steps == sorted(set(last_steps))
    assert last_steps[0] >= 1 and last_steps[-1] == steps.num_steps
